"""Shared parts of all experiments: the command line and pictures."""
