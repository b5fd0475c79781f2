"""Checks of arguments. They run in Python while a function is built or traced, never in a compiled program.

Every message names the argument, the allowed values and the given value.
"""

import functools
import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from maml_jax.types import LossFn, Params, Task


def positive(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a positive, finite number. A traced value has no number, so it passes."""
    if isinstance(value, jax.core.Tracer):
        return
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a positive number, but got {value!r}.") from error
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be positive and finite, but got {number:g}.")


def at_least(name: str, value: Any, minimum: int) -> None:
    """Raises ValueError unless `value` is an integer of at least `minimum`."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} must be static, but it is traced: use static_argnums or static_argnames of jax.jit.")
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, but got {value!r}.")


def weights(name: str, value: Any, count: int) -> None:
    """Raises ValueError unless `value` holds `count` finite numbers of at least 0 that are not all 0."""
    try:
        numbers = [float(number) for number in value]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be {count} numbers, but got {value!r}.") from error
    if len(numbers) != count or not all(0 <= number < math.inf for number in numbers) or not any(numbers):
        raise ValueError(
            f"{name} must be {count} finite numbers of at least 0 that are not all 0, one before the first inner step "
            f"and one after each, but got {value!r}."
        )


def one_of(name: str, value: Any, allowed: Collection[Any]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, but got {value!r}.")


def transformation(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is an optax transformation."""
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise TypeError(f"{name} must be an optax transformation, such as optax.adam(1e-3), but got {value!r}.")


def inner(name: str, value: Any, kind: type) -> None:
    """Raises TypeError unless `value` is of type `kind`: `InnerLearner`, which this module may not import."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be an InnerLearner, such as maml_jax.sgd(0.01, steps=1), but got {value!r}.")


def checked_loss(loss_fn: LossFn) -> LossFn:
    """Wraps a loss function with a check of its return value. Other errors get a note with the shapes of the batch.

    Raises:
      TypeError: if `loss_fn` is not callable; when called, if it does not return a pair `(loss, aux)`.
      ValueError: when called, if the loss is not a floating-point scalar, or inside a `shard_map` with `check_vma`.
    """
    name = getattr(loss_fn, "__qualname__", None) or repr(loss_fn)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function (params, batch) -> (scalar loss, aux), but got {name}.")

    @functools.wraps(loss_fn, updated=())
    def checked(params, batch):
        if any(getattr(getattr(jax.typeof(leaf), "mat", None), "varying", None) for leaf in jax.tree.leaves(batch)):
            raise ValueError(
                "The loss was called inside a jax.shard_map with check_vma=True, which sums the inner gradients over "
                "the devices. Give the devices to the learner, such as maml(..., mesh=task_mesh(T)), or use "
                "check_vma=False and average the results over the devices with jax.lax.pmean."
            )
        try:
            out = loss_fn(params, batch)
        except Exception as error:
            given = jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", batch)
            call = f"The loss function {name} was called for one task, with the batch {given}."
            error.add_note(f"{call} A meta-batch has a leading axis of tasks; the batch that adapt takes has none.")
            raise
        if not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(
                f"The loss function {name} must return a pair (scalar loss, aux), but returned "
                f"{_describe(out)}. If there is no aux, `return loss, {{}}`."
            )
        loss, aux = out
        if not hasattr(loss, "dtype") and not isinstance(loss, float):
            raise TypeError(
                f"The loss function {name} must return the loss first and aux second, but its first value is "
                f"{_describe(loss)}."
            )
        if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            raise ValueError(
                f"The loss function {name} must return a scalar floating-point loss, but the returned loss is "
                f"{_describe(loss)}. Reduce the loss over the batch, for example with `loss.mean()`."
            )
        return loss, jax.tree.map(jnp.asarray, aux)

    return checked


def floating_params(params: Params) -> None:
    """Checks that all parameters are floating-point arrays.

    Raises:
      TypeError: if a leaf is not a floating-point array; the message names the leaf.
      ValueError: if there is no leaf.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("params must hold at least one array, but holds none.")
    for path, leaf in leaves:
        if isinstance(leaf, float) and not hasattr(leaf, "dtype"):
            raise TypeError(f"params{jax.tree_util.keystr(path)} is a Python number: use jnp.asarray({leaf!r}).")
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} must be a floating-point array, but is {_describe(leaf)}. "
                "Split other leaves off, for example with nnx.split(model, nnx.Param, ...) or eqx.partition(model, "
                "eqx.is_inexact_array), and close over them in the loss. Give a complex number as two real parameters."
            )


def num_tasks(tasks: Task) -> int:
    """Returns the number of tasks in a batch, `T`.

    Raises:
      TypeError: if `tasks` is not a `Task`.
      ValueError: if the leading axes of the leaves differ, or if there is no task; the message names two leaves.
    """
    if not isinstance(tasks, Task):
        raise TypeError(
            f"tasks must be a maml_jax.Task(support, query) whose leaves have a leading task axis, but got "
            f"{type(tasks).__name__}."
        )
    return leading_axis_size(tasks)


def leading_axis_size(tasks: Any) -> int:
    """Returns the size of the leading axis that all leaves of a pytree share. Raises ValueError like `num_tasks`."""
    leaves = [(f"tasks{jax.tree_util.keystr(p)}", x) for p, x in jax.tree_util.tree_leaves_with_path(tasks)]
    if not leaves:
        raise ValueError("tasks must hold at least one array, but holds none.")
    for path, leaf in leaves:
        if jnp.ndim(leaf) == 0:
            raise ValueError(
                f"{path} is a scalar, but every leaf of a batch of tasks needs a leading axis over tasks. "
                "Repeat the value for each task, or close over the value in the loss."
            )
    (first, reference), *others = leaves
    size = jnp.shape(reference)[0]
    for path, leaf in others:
        if jnp.shape(leaf)[0] != size:
            raise ValueError(
                f"The leaves of a batch of tasks must have the same leading axis, the number of tasks, but {first} "
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
