"""Shared parts of the few-shot experiments: the options of a run, the methods, evaluation."""
