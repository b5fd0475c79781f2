"""Environments: 2D navigation, MuJoCo locomotion and Gymnasium environments, and the engines MuJoCo and MJX."""
