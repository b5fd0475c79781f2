"""Runs on disk: run directories, checkpoints, metrics, model files, signals and provenance."""
