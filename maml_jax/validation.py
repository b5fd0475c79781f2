"""Checks of what a user gives, made in plain Python while building or tracing, never at run time.

Every message says what was given, what is allowed, and what to do.
"""

import functools
import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from maml_jax.types import LossFn, Params, Task


def positive(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a positive, finite number. Traced values pass: they have none yet."""
    if isinstance(value, jax.core.Tracer):
        return
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a positive number, but got {value!r}.") from error
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be positive and finite, but got {number:g}.")


def at_least(name: str, value: Any, least: int) -> None:
    """Raises ValueError unless `value` is an integer not below `least`."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} must be known when the function is traced: mark it static, as in static_argnums.")
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, but got {value!r}.")


def seed(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is an integer from 0 to 2**32 - 1: JAX takes larger ones for smaller."""
    _within(name, value, 0, 2**32 - 1)


def meta_steps(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is an integer from 1 to 2**31 - 1, as far as a state can count."""
    _within(name, value, 1, 2**31 - 1)


def _within(name: str, value: Any, least: int, most: int) -> None:
    at_least(name, value, least)
    if value > most:
        raise ValueError(f"{name} must be an integer of at most {most}, but got {value!r}.")


def weights(name: str, value: Any, count: int) -> None:
    """Raises ValueError unless `value` is `count` finite numbers that are not negative, and not all zero."""
    try:
        numbers = [float(number) for number in value]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be {count} numbers, but got {value!r}.") from error
    if len(numbers) != count or not all(0 <= number < math.inf for number in numbers) or not any(numbers):
        raise ValueError(
            f"{name} must be {count} finite numbers that are not negative and not all zero, one before the first and "
            f"one after each inner step, but got {value!r}."
        )


def different(name: str, values: Collection[Any]) -> None:
    """Raises ValueError unless there is at least one of `values`, and none twice."""
    if not values:
        raise ValueError(f"{name} must name at least one, but got none.")
    if len(set(values)) < len(values):
        raise ValueError(f"{name} must be different from each other, but got {', '.join(map(str, values))}.")


def one_of(name: str, value: Any, allowed: Collection[Any]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, but got {value!r}.")


def transformation(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is an optax transformation."""
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise TypeError(f"{name} must be an optax transformation, such as optax.adam(1e-3), but got {value!r}.")


def inner(name: str, value: Any, kind: type) -> None:
    """Raises TypeError unless `value` is an inner learner."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must come from maml_jax.sgd or maml_jax.unrolled, but got {value!r}.")


def checked_loss(loss_fn: LossFn) -> LossFn:
    """Wraps a user's loss so that a wrong return value is explained where it happens.

    Raises (when called):
      TypeError: the loss returned no `(loss, aux)` pair.
      ValueError: the loss is not a floating-point scalar.
    """
    name = getattr(loss_fn, "__qualname__", None) or repr(loss_fn)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function (params, batch) -> (scalar loss, aux), but got {name}.")

    @functools.wraps(loss_fn, updated=())
    def checked(params, batch):
        out = loss_fn(params, batch)
        if not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(
                f"The loss function {name} must return a pair (scalar loss, aux), but returned "
                f"{_describe(out)}. If there is nothing to report beside the loss, `return loss, {{}}`."
            )
        loss, aux = out
        if not hasattr(loss, "dtype") and not isinstance(loss, float):
            raise TypeError(
                f"The loss function {name} must return the loss first and aux second, but its first value is "
                f"{_describe(loss)}."
            )
        if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            raise ValueError(
                f"The loss function {name} must return a scalar floating-point loss, but its loss is "
                f"{_describe(loss)}. Reduce it over the batch, for example with `loss.mean()`."
            )
        return loss, jax.tree.map(jnp.asarray, aux)

    return checked


def floating_params(params: Params) -> None:
    """Raises TypeError, naming the leaf, if a parameter is not a floating-point array; ValueError if there is none."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("params holds no arrays at all, so there is nothing to meta-learn.")
    for path, leaf in leaves:
        if isinstance(leaf, float) and not hasattr(leaf, "dtype"):
            raise TypeError(f"params{jax.tree_util.keystr(path)} is a Python number: give jnp.asarray({leaf!r}).")
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} is {_describe(leaf)}, which no gradient can change. Give only "
                "floating-point arrays: split the rest off first, as nnx.split(model, nnx.Param, ...) or "
                "eqx.partition(model, eqx.is_inexact_array) do, and close over it in the loss."
            )


def task_axis(tasks: Task) -> int:
    """Returns `T`, the number of tasks; raises ValueError, naming two leaves, if the leading axes disagree."""
    if not isinstance(tasks, Task):
        raise TypeError(
            f"tasks must be a maml_jax.Task(support, query) whose leaves have a leading task axis, but got "
            f"{type(tasks).__name__}."
        )
    return leading_axis(tasks)


def leading_axis(tasks: Any) -> int:
    """As `task_axis`, of any pytree."""
    leaves = [(f"tasks{jax.tree_util.keystr(p)}", x) for p, x in jax.tree_util.tree_leaves_with_path(tasks)]
    if not leaves:
        raise ValueError("tasks holds no arrays.")
    for path, leaf in leaves:
        if jnp.ndim(leaf) == 0:
            raise ValueError(
                f"{path} is a scalar, but every leaf of a batch of tasks needs a leading axis over tasks. "
                "Repeat it for each task, or close over it in the loss."
            )
    (first, reference), *others = leaves
    size = jnp.shape(reference)[0]
    for path, leaf in others:
        if jnp.shape(leaf)[0] != size:
            raise ValueError(
                f"The leaves of a batch of tasks must agree in their leading axis, the number of tasks, but {first} "
                f"has shape {jnp.shape(reference)} and {path} has shape {jnp.shape(leaf)}."
            )
    if size == 0:
        raise ValueError(f"A batch of tasks must hold at least one task, but {first} has shape {jnp.shape(reference)}.")
    return size


def _describe(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array of shape {tuple(value.shape)} and type {value.dtype}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)} values"
    return f"a value of type {type(value).__name__}"
