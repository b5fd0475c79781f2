"""Summaries over test tasks."""

from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean over tasks and the half width of its 95% interval, as the paper gives them."""

    mean: np.ndarray
    half_width: np.ndarray


def interval(values: np.ndarray) -> Interval:
    """Mean over the first axis (tasks) with 1.96 standard errors on either side: `[T, ...] -> [...]`.

    Where a task is infinite, as one that has diverged, the half width is NaN.
    """
    values = np.asarray(values, np.float64)
    with np.errstate(invalid="ignore"):
        return Interval(values.mean(0), 1.96 * values.std(0) / np.sqrt(len(values)))


def divergence_rate(support_loss: np.ndarray) -> np.ndarray:
    """Fraction of tasks on which gradient descent has diverged: it made larger what it is to make smaller.

    Args:
      support_loss: `[T, S + 1]`, from before adaptation on, as `Evaluation.support_loss`.

    Returns:
      `[S + 1]`: after each step, the tasks whose support loss is above that before adaptation, or not finite.
    """
    support_loss = np.asarray(support_loss)
    return 1 - (support_loss <= support_loss[:, :1]).mean(0)
