"""Reptile: moves the parameters towards where adaptation took them, with no derivative of it (Nichol et al. 2018)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from maml_jax import validation
from maml_jax.inner import InnerLearner, inner_loop
from maml_jax.meta import MetaLearner, meta_learner
from maml_jax.parallel.task_axis import TaskBatchSize, sum_over_tasks
from maml_jax.types import Batch, InnerParams, LossFn, Params, Task

Batches = Callable[[Batch, int], Batch]
"""`(support, steps) -> batches` of the inner steps in training: every leaf has a leading axis `[steps]`."""


def reptile(
    loss_fn: LossFn,
    inner: InnerLearner,
    outer: optax.GradientTransformation,
    *,
    batches: Batches | None = None,
    query_loss_fn: LossFn | None = None,
    task_batch_size: TaskBatchSize = None,
    mesh: Mesh | None = None,
) -> MetaLearner:
    """Reptile with batches of tasks (Nichol et al. 2018, algorithm 2).

    The gradient of a task is where it started minus where it arrived, so `optax.sgd(e)` as `outer` moves
    the parameters by the fraction e towards the mean of the adapted ones. Only the support set is
    learned from; the query set is there for the metrics. With a single inner step it is joint training.
    What the inner learner leaves as it is (`trainable`) is not meta-learned either.

    Args:
      batches: what of the support set each inner step sees in training, such as `one_of_each_class(N)`; None:
        all of it. Where steps see different examples, what one learns is made to help with the others
        (section 5.1).
      others: as those of `maml`.

    Raises:
      TypeError, ValueError: as `maml`, and for an inner learner with a start, a `params_at_step` or learned rates:
        Reptile has no gradient of them.
    """
    validation.inner("inner", inner, InnerLearner)
    if inner.start is not None or inner.params_at_step is not None:
        raise ValueError(
            "reptile takes an inner learner without start and params_at_step: it moves the parameters towards the "
            "adapted parameters."
        )
    support_loss = validation.checked_loss(loss_fn)
    query_loss = validation.checked_loss(query_loss_fn or loss_fn)

    def gradient(shared: tuple[tuple[Params, InnerParams], jax.Array], task: Task) -> tuple[Any, Any]:
        (params, inner_params), _ = shared
        support = task.support if batches is None else batches(task.support, inner.steps)
        adapted, info = inner_loop(
            inner, support_loss, params, inner_params, support, batch_per_step=batches is not None
        )
        loss, aux = query_loss(adapted, task.query)
        return (loss, (jax.tree.map(jnp.subtract, params, adapted), inner_params)), (aux, info)

    validation.transformation("outer", outer)
    # What is no gradient of the loss is not to be set beside it, as an optimizer that is given both would.
    plain = optax.GradientTransformation(outer.init, lambda way, state, params=None: outer.update(way, state, params))
    of_tasks = sum_over_tasks(gradient)
    return meta_learner(
        of_tasks,
        support_loss,
        query_loss,
        inner,
        plain,
        learns_inner_params=False,
        task_batch_size=task_batch_size,
        mesh=mesh,
    )


def one_of_each_class(ways: int) -> Batches:
    """Step i sees the i-th example of every class, and after the last the first again.

    Args:
      ways: N; the support set `[N * K, ...]` holds the K examples of a class together, as `episodes` do.
    """

    def batches(support: Batch, steps: int) -> Batch:
        def of_leaf(leaf: jax.Array) -> jax.Array:
            by_shot = leaf.reshape(ways, -1, *leaf.shape[1:]).swapaxes(0, 1)
            return by_shot[jnp.arange(steps) % len(by_shot)]

        return jax.tree.map(of_leaf, support)

    return batches
