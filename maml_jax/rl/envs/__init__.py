"""Environments: 2D navigation, MuJoCo locomotion, and adapters for MuJoCo, MJX and Gymnasium."""
