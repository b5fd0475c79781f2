"""Distributions of tasks: sine curves, and few-shot classification episodes of images."""
