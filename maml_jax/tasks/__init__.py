"""Distributions of tasks: sinusoids, and few-shot classification episodes of images."""
