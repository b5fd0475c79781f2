"""Reptile: moves the parameters towards the adapted parameters, without differentiating through adaptation."""

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
from maml_jax.types import Batch, LossFn, MetaParams, Task

Batches = Callable[[Batch, int], Batch]
"""`(support, steps) -> batches`: selects one batch for each inner step in training. Every leaf is `[steps, ...]`."""


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

    The meta-gradient of a task is its initial parameters minus its adapted parameters. With `optax.sgd(e)` as `outer`,
    the parameters move by the fraction e towards the mean of the adapted parameters. Training uses the support set
    alone; the query set gives the metrics. With one inner step Reptile is joint training.

    Example:
      >>> import jax, jax.numpy as jnp, maml_jax, optax
      >>> def loss_fn(params, batch):
      ...     return jnp.sum((params - batch) ** 2) / 2, {}
      >>> learner = maml_jax.reptile(loss_fn, maml_jax.sgd(0.5, steps=2), optax.sgd(0.1))
      >>> state = learner.init(jnp.zeros(1))
      >>> task = maml_jax.Task(support=jnp.array([[4.0]]), query=jnp.array([[4.0]]))
      >>> state, info = jax.jit(learner.step)(state, task)  # The adapted parameter is 3.
      >>> print(jnp.round(state.params, 3))
      [0.3]

    Args:
      loss_fn: `(params, batch) -> (scalar loss, aux)`, of one task.
      inner: the inner learner, such as `sgd(0.1, steps=5)`. Parameters that it does not adapt (`trainable`) are not
        meta-learned either. `order` and `remat` have no effect.
      outer: the outer optimizer. It does not get the loss, because the meta-gradient is not the derivative of a loss.
      batches: selects the batch of each inner step in training, such as `one_of_each_class(N)`. None: every step uses
        the whole support set. Different examples in each step improve Reptile (section 5.1).
      query_loss_fn, task_batch_size, mesh: as for `maml`.

    Returns:
      A `MetaLearner`. `MetaInfo.grad_norm` is the distance to the mean of the adapted parameters.

    Raises:
      TypeError, ValueError: as `maml`, and for an inner learner without steps, with `start` or with `params_at_step`.
      ValueError (by `init`): for an inner learner with learned parameters. Reptile has no gradient for them.

    References:
      Nichol, Achiam and Schulman 2018, On first-order meta-learning algorithms, arXiv:1803.02999.
    """
    validation.inner("inner", inner, InnerLearner)
    validation.at_least("inner.steps", inner.steps, 1)
    if inner.start is not None or inner.params_at_step is not None:
        raise ValueError(
            "reptile takes an inner learner without start and params_at_step: its meta-gradient compares the initial "
            "parameters with the adapted parameters."
        )
    validation.transformation("outer", outer)
    support_loss = validation.checked_loss(loss_fn)
    query_loss = validation.checked_loss(query_loss_fn or loss_fn)

    def task_gradient(meta_params: MetaParams, task: Task, step: jax.Array) -> tuple[Any, Any]:
        params, inner_params = meta_params

        # Adapt to the support set, or to one batch of it in each inner step.
        support = task.support if batches is None else batches(task.support, inner.steps)
        adapted, info = inner_loop(
            inner, support_loss, params, inner_params, support, batch_per_step=batches is not None
        )

        # The query loss is a metric. The meta-gradient points from the adapted parameters to the initial ones.
        loss, aux = query_loss(adapted, task.query)
        direction = jax.tree.map(jnp.subtract, params, adapted)
        return (loss, MetaParams(direction, inner_params)), (aux, info)

    def gradient(meta_params: MetaParams, tasks: Task, step: jax.Array) -> tuple[Any, MetaParams]:
        (loss, grads), info = sum_over_tasks(task_gradient)(meta_params, tasks, step)
        return (loss, info), grads

    # This `update` takes no extra arguments, so the outer optimizer does not get the query loss, whose gradient the
    # meta-gradient is not.
    outer_without_loss = optax.GradientTransformation(
        outer.init, lambda grads, state, params=None: outer.update(grads, state, params)
    )
    return meta_learner(
        gradient,
        support_loss,
        query_loss,
        inner,
        outer_without_loss,
        learns_inner_params=False,
        task_batch_size=task_batch_size,
        mesh=mesh,
    )


def one_of_each_class(ways: int) -> Batches:
    """Batches for `reptile`: inner step i uses the i-th example of every class, and after the K-th the first again.
    Example:
      >>> import jax.numpy as jnp
      >>> support = jnp.array([0, 1, 10, 11])  # Two classes of two examples.
      >>> one_of_each_class(ways=2)(support, 3).tolist()
      [[0, 10], [1, 11], [0, 10]]

    Args:
      ways: number of classes N. In the support set `[N * K, ...]`, the K examples of a class must follow each other, as
        in the episodes of `tasks.episodes`.

    Returns:
      A function for the argument `batches` of `reptile`.
    """

    def batches(support: Batch, steps: int) -> Batch:
        def select(leaf: jax.Array) -> jax.Array:
            by_shot = leaf.reshape(ways, -1, *leaf.shape[1:]).swapaxes(0, 1)
            return by_shot[jnp.arange(steps) % len(by_shot)]

        return jax.tree.map(select, support)

    return batches
