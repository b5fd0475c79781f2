"""Summaries over test tasks."""

from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean over tasks and the half width of its 95% interval, as the paper gives them."""

    mean: np.ndarray
    half_width: np.ndarray


def interval(values: np.ndarray) -> Interval:
    """Mean over the first axis (tasks) with 1.96 standard errors on either side: `[T, ...] -> [...]`."""
    values = np.asarray(values, np.float64)
    return Interval(values.mean(0), 1.96 * values.std(0) / np.sqrt(len(values)))


def divergence_rate(loss: np.ndarray) -> np.ndarray:
    """Fraction of tasks that adaptation left worse than it found them, or not finite, after each step.

    Args:
      loss: `[T, S + 1]`, query losses from before adaptation on.

    Returns:
      `[S + 1]`, the first of which is 0 unless a loss is not finite to begin with.
    """
    loss = np.asarray(loss)
    return 1 - (loss <= loss[:, :1]).mean(0)
