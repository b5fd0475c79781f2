"""Finds values of the tasks that make a loss NaN or infinite before the first inner step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax.types import Task


def values_to_check(tasks: Any) -> str:
    """Names the leaves with values that are not finite, or else the range of the integers, which may be labels.

    Example:
      >>> import numpy as np, maml_jax
      >>> batch = (np.zeros((2, 5, 3)), np.tile(np.arange(1, 6), (2, 1)))
      >>> print(values_to_check(maml_jax.Task(batch, batch[0])))
      tasks.support[1] holds integers from 1 to 5. Labels of N classes must be 0 to N - 1.

    Args:
      tasks: one task or a batch of tasks.

    Returns:
      A sentence or two, without a line break; an empty string if there is nothing to name.
    """
    not_finite, integers = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tasks):
        name, kind = f"tasks{jax.tree_util.keystr(path)}", jnp.result_type(leaf)
        if jnp.issubdtype(kind, jnp.inexact) and not np.isfinite(np.asarray(leaf)).all():
            not_finite.append(name)
        elif jnp.issubdtype(kind, jnp.integer) and np.size(leaf):
            integers.append(f"{name} holds integers from {np.min(leaf)} to {np.max(leaf)}")
    if not_finite:
        return f"Values that are not finite: {', '.join(not_finite)}."
    return f"{', '.join(integers)}. Labels of N classes must be 0 to N - 1." if integers else ""


def before_adaptation(learner: Any, state: Any, tasks: Any) -> str:
    """Says what to check if the losses of some tasks are not finite before the first inner step.

    Args:
      learner: the learner.
      state: a state with finite parameters.
      tasks: the meta-batch.

    Returns:
      Sentences for an error message; an empty string if the losses are finite, or if the tasks are no `Task`.
    """
    if not isinstance(tasks, Task):
        return ""
    evaluation = learner.evaluate(state, tasks, 0)
    wrong = [name for name in ("support_loss", "loss") if not np.isfinite(getattr(evaluation, name)).all()]
    if not wrong:
        return ""
    of = {"support_loss": "support", "loss": "query"}[wrong[0]]
    return (
        f"The {of} loss is not finite before the first inner step, so the rates are not the cause. "
        f"{values_to_check(tasks)}"
    ).strip()
