"""Runs on disk: checkpoints, metrics, model files, signals, provenance."""
