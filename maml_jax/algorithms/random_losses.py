"""Losses with random numbers, such as dropout, with other numbers for each task and each inner step.

A loss is a function of parameters and a batch, so its random key is a part of the batch. `with_keys` gives every task a
key for its support set and one for its query set. `with_step` passes the number of the inner step to the loss, and
`keyed_loss` folds the step into the key.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from maml_jax import validation
from maml_jax.types import Batch, LossFn, Params, Task


def keyed_loss(loss_fn: Callable[[Params, Batch, jax.Array], tuple[jax.Array, Any]]) -> LossFn:
    """Converts a loss with a random key to a loss for `maml`, with a key of its own for each task and inner step.

    Example:
      >>> import jax, jax.numpy as jnp, maml_jax, optax
      >>> from maml_jax.algorithms.random_losses import keyed_loss, with_keys, with_step
      >>> def loss_fn(params, batch, key):  # Dropout of half of the inputs.
      ...     inputs, targets = batch
      ...     kept = jax.random.bernoulli(key, 0.5, inputs.shape)
      ...     return jnp.mean(((kept * inputs) @ params - targets) ** 2), {}
      >>> inner = maml_jax.sgd(0.1, steps=2, params_at_step=with_step)
      >>> learner = maml_jax.maml(keyed_loss(loss_fn), inner, optax.adam(1e-3))
      >>> batch = (jnp.ones((4, 5, 3)), jnp.ones((4, 5)))  # Four tasks of five examples.
      >>> tasks = with_keys(maml_jax.Task(batch, batch), jax.random.key(0))
      >>> state, info = jax.jit(learner.step)(learner.init(jnp.zeros(3)), tasks)
      >>> info.support_loss.shape
      (4, 2)
      >>> (params, step), _ = learner.adapt(state, jax.tree.map(lambda leaf: leaf[0], tasks).support)

    Args:
      loss_fn: `(params, batch, key) -> (scalar loss, aux)`, for one task.

    Returns:
      `((params, step), (batch, key)) -> (scalar loss, aux)`, for an inner learner with `params_at_step=with_step` and
      tasks from `with_keys`. With this learner, `adapt` returns `(params, step)` in place of `params`.
    """

    @functools.wraps(loss_fn, updated=())  # Errors name the loss of the caller.
    def with_step_and_key(params_and_step: Any, batch_and_key: Any) -> tuple[jax.Array, Any]:
        (params, step), (batch, key) = params_and_step, batch_and_key
        return loss_fn(params, batch, jax.random.fold_in(key, step))

    return with_step_and_key


def with_step(params: Params, step: jax.Array) -> Any:
    """`(params, step)`, for the option `params_at_step` of an inner learner. The query loss after S steps gets S."""
    return params, step


def with_keys(tasks: Task, key: jax.Array) -> Task:
    """Adds a random key to the support set and to the query set of each task.

    Example:
      >>> import jax, jax.numpy as jnp, maml_jax
      >>> tasks = with_keys(maml_jax.Task(jnp.zeros((4, 5)), jnp.zeros((4, 15))), jax.random.key(0))
      >>> batch, keys = tasks.query
      >>> batch.shape, keys.shape
      ((4, 15), (4,))

    Args:
      tasks: a batch of tasks, every leaf `[T, ...]`.
      key: a key of the meta-step, such as `jax.random.fold_in(key, step)` in the `draw` of `train`.

    Returns:
      Tasks with support and query sets `(batch, keys [T])`.

    Raises:
      TypeError: if `tasks` is not a `Task`.
      ValueError: if the leading axes of the leaves differ.
    """
    keys = jax.random.split(key, (2, validation.num_tasks(tasks)))
    return Task((tasks.support, keys[0]), (tasks.query, keys[1]))
