"""Runs on disk: checkpoints, metrics, logs and model files."""
