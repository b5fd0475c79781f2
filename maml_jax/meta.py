"""MAML: meta-learns the parameters from which the inner loop starts (Finn et al. 2017, algorithm 1).

What sets an algorithm apart is the gradient that tasks give; `meta_learner` makes the rest of it, the same
for all.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from maml_jax import validation
from maml_jax.inner import InnerLearner, adapted_part, inner_loop, update
from maml_jax.parallel.task_axis import TaskBatchSize, per_task, task_axis
from maml_jax.types import AdaptInfo, Batch, Evaluation, InnerParams, LossFn, MetaInfo, MetaState, Params, Task


class MetaLearner(NamedTuple):
    """A meta-learning algorithm as pure, unjitted functions.

    `init(params) -> MetaState`;
    `step(state, tasks) -> (MetaState, MetaInfo)`, one outer update on a batch of tasks;
    `evaluate(state, tasks, steps=None) -> Evaluation`, with `steps` inner steps (None: as in training), before the
    first and after each of them; with `only_last=True` (not in `rl`) after the last alone, which spares the rest;
    `adapt(state, batch, steps=None) -> (params, AdaptInfo)`, to one new task as in training, with its
    learned rates, mask and optimizer; losses are those before each inner step, `[steps]`.

    Jit them yourself: `jax.jit(learner.step, donate_argnums=0)`, `jax.jit(learner.evaluate, static_argnums=2)`, and
    with `only_last`, which is static too, `static_argnames=("steps", "only_last")`.
    """

    init: Callable[[Params], MetaState]
    step: Callable[[MetaState, Any], tuple[MetaState, MetaInfo]]
    """Tasks are a `Task`; those of `rl.meta_rl` its `TaskBatch`."""
    evaluate: Callable[..., Evaluation]
    adapt: Callable[..., tuple[Params, AdaptInfo]]


Gradient = Callable[[tuple[tuple[Params, InnerParams], jax.Array], Task], tuple[Any, Any]]
"""`((meta_params, meta-step), tasks) -> ((loss, gradient of meta_params), (aux, AdaptInfo))`, of a group of
tasks `[G, ...]`: the first summed over it, the second of each task. `task_axis.sum_over_tasks` makes it of one
task's."""

StepWeights = Sequence[float] | Callable[[jax.Array], jax.Array]


def maml(
    loss_fn: LossFn,
    inner: InnerLearner,
    outer: optax.GradientTransformation,
    *,
    query_loss_fn: LossFn | None = None,
    step_weights: StepWeights | None = None,
    task_batch_size: TaskBatchSize = None,
    mesh: Mesh | None = None,
) -> MetaLearner:
    """Model-agnostic meta-learning.

    Args:
      loss_fn: `(params, batch) -> (scalar loss, aux)`, of one task.
      inner: how a task is learned, e.g. `sgd(0.01, steps=1)`.
      outer: any optax optimizer, but none that evaluates the loss again by itself, as the line search of
        `optax.lbfgs` does. It acts on the pair `(params, inner_params)`;
        `inner_params` is `()` unless the inner learner has learned rates.
      query_loss_fn: the loss of the query set where it differs from `loss_fn`.
      step_weights: `S + 1` weights of the query loss before the first and after each inner step, whose
        weighted sum is minimised (the multi-step loss of MAML++, Antoniou et al. 2019, section 4), or a
        function from the meta-step to them, such as
        `schedules.multi_step_weights`. None: the query loss after the
        last step alone.
      task_batch_size: how many tasks are computed together, the others after them: 1 has the least
        memory, 'all' the least overhead. None takes what suits the backend and the number of
        parameters. Results agree up to rounding.
      mesh: devices among which the tasks are divided, such as `task_axis.task_mesh(T)`; None uses one.

    Returns:
      A `MetaLearner`. Its functions raise ValueError or TypeError, while they are traced, for tasks
      whose leaves disagree in their leading axis and for a loss that does not return `(scalar, aux)`.
    """
    validation.inner("inner", inner, InnerLearner)
    if step_weights is not None and not callable(step_weights):
        validation.weights("step_weights", step_weights, inner.steps + 1)
    support_loss = validation.checked_loss(loss_fn)
    query_loss = validation.checked_loss(query_loss_fn or loss_fn)

    def gradient(shared: tuple[tuple[Params, InnerParams], jax.Array], tasks: Task) -> tuple[Any, Any]:
        meta_params, step = shared
        weights = step_weights(step) if callable(step_weights) else step_weights
        if weights is not None and (shape := np.shape(weights)) != (inner.steps + 1,):
            raise ValueError(
                f"step_weights must be {inner.steps + 1} weights, one before the first inner step and one after each, "
                f"but has the shape {shape}."
            )
        per_task_loss = per_task(partial(task_loss, support_loss, query_loss, inner, step_weights=weights))

        # Of the sum, not of each task: so the parameters that tasks share get one gradient in one product.
        def total(meta_params: tuple[Params, InnerParams]) -> tuple[jax.Array, Any]:
            losses, info = per_task_loss(meta_params, tasks)
            return losses.sum(), info

        (loss, info), grads = jax.value_and_grad(total, has_aux=True)(meta_params)
        return (loss, grads), info

    return meta_learner(gradient, support_loss, query_loss, inner, outer, task_batch_size=task_batch_size, mesh=mesh)


def meta_learner(
    gradient: Gradient,
    support_loss: LossFn,
    query_loss: LossFn,
    inner: InnerLearner,
    outer: optax.GradientTransformation,
    *,
    learns_inner_params: bool = True,
    task_batch_size: TaskBatchSize = None,
    mesh: Mesh | None = None,
) -> MetaLearner:
    """The algorithm that follows the mean over tasks of `gradient`; the other arguments are those of `maml`.

    Without `learns_inner_params` an inner learner with learned rates is refused, of which there is no gradient then.
    Evaluation and adaptation go through the inner loop alone, and so do not depend on `gradient`.
    """
    validation.transformation("outer", outer)
    over_tasks = task_axis(task_batch_size, mesh)

    def init(params: Params) -> MetaState:
        validation.floating_params(params)
        params = jax.tree.map(jnp.array, params)  # Copies: a donated state must not take the user's own along.
        inner_params = inner.init_inner_params(adapted_part(inner, params))
        if not learns_inner_params and jax.tree.leaves(inner_params):
            raise ValueError(
                "This algorithm has no gradient for learned rates of the inner loop: give a learner without."
            )
        # Of copies: an optimizer may keep what it is given, and the same array cannot be donated twice.
        opt_state = outer.init(jax.tree.map(jnp.array, (params, inner_params)))
        return over_tasks.replicate(MetaState(jnp.zeros([], jnp.int32), params, inner_params, opt_state))

    def step(state: MetaState, tasks: Task) -> tuple[MetaState, MetaInfo]:
        meta_params = (state.params, state.inner_params)
        (loss, grads), (aux, info) = over_tasks.mean(gradient, (meta_params, state.step), tasks)
        updates, opt_state = update(outer, grads, state.opt_state, meta_params, loss)
        params, inner_params = optax.apply_updates(meta_params, updates)
        return (
            MetaState(state.step + 1, params, inner_params, opt_state),
            MetaInfo(loss, aux, info.loss, optax.tree.norm(grads)),
        )

    def evaluate(state: MetaState, tasks: Task, steps: int | None = None, *, only_last: bool = False) -> Evaluation:
        validation.num_tasks(tasks)
        if steps is not None:
            validation.at_least("steps", steps, 0)

        def one_task(meta_params: tuple[Params, InnerParams], task: Task) -> Evaluation:
            def probe(params: Params) -> Evaluation:
                return Evaluation(*query_loss(params, task.query), support_loss(params, task.support)[0])

            along = None if only_last else probe
            params, info = inner_loop(inner, support_loss, *meta_params, task.support, steps=steps, probe=along)
            return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], probe(params)) if only_last else info.probes

        return over_tasks.map(one_task, (state.params, state.inner_params), tasks)

    def adapt(state: MetaState, batch: Batch, steps: int | None = None) -> tuple[Params, AdaptInfo]:
        if steps is not None:
            validation.at_least("steps", steps, 0)
        return inner_loop(inner, support_loss, state.params, state.inner_params, batch, steps=steps)

    return MetaLearner(init, step, evaluate, adapt)


def task_loss(
    support_loss: LossFn,
    query_loss: LossFn,
    inner: InnerLearner,
    meta_params: tuple[Params, InnerParams],
    task: Task,
    *,
    step_weights: Sequence[float] | jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """One task's share of the meta-objective: the query loss after adaptation (paper, equation 1).

    Returns:
      The loss, or with `step_weights` the weighted sum of those along the way, and the pair (aux of
      the query loss after adaptation, `AdaptInfo`).
    """
    params, inner_params = meta_params
    if step_weights is None:
        adapted, info = inner_loop(inner, support_loss, params, inner_params, task.support)
        loss, aux = query_loss(adapted, task.query)
        return loss, (aux, info)
    _, info = inner_loop(
        inner, support_loss, params, inner_params, task.support, probe=lambda params: query_loss(params, task.query)
    )
    losses, aux = info.probes
    aux = jax.tree.map(lambda leaf: leaf[-1], aux)
    return jnp.vdot(jnp.asarray(step_weights, losses.dtype), losses), (aux, info._replace(probes=None))
