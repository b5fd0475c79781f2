"""MAML: meta-learns the parameters from which the inner loop starts (Finn et al. 2017, algorithm 1).

Algorithms differ in their meta-gradient. `meta_learner` takes a meta-gradient and adds the outer step, evaluation and
adaptation, which are the same for all algorithms.
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
from maml_jax.parallel.task_axis import TaskAxis, TaskBatchSize, sum_over_tasks, task_axis
from maml_jax.types import AdaptInfo, Batch, Evaluation, LossFn, MetaInfo, MetaParams, MetaState, Params, Task


class MetaLearner(NamedTuple):
    """A meta-learning algorithm as four pure functions.

    Compile `step` with `jax.jit(learner.step, donate_argnums=0)`. `evaluate` and `adapt` are compiled already, once
    for each shape of their arguments, except those of `maml_jax.rl`.
    """

    init: Callable[[Params], MetaState]
    """`init(params) -> MetaState`."""
    step: Callable[[MetaState, Any], tuple[MetaState, MetaInfo]]
    """`step(state, tasks) -> (MetaState, MetaInfo)`: one outer update on a meta-batch. `tasks` is a `Task`, or a
    `TaskBatch` in `maml_jax.rl`."""
    evaluate: Callable[..., Evaluation]
    """`evaluate(state, tasks, steps=None, *, only_last=False) -> Evaluation`: losses before adaptation and after each
    of `steps` inner steps (None: as many steps as in training). `only_last=True` evaluates the losses only after the
    last step; learners of `maml_jax.rl` do not have this argument."""
    adapt: Callable[..., tuple[Params, AdaptInfo]]
    """`adapt(state, batch, steps=None) -> (params, AdaptInfo)`: adapts to the support set of one new task, with the
    inner loop of training. `AdaptInfo.loss` `[steps]` holds the loss before each inner step."""


Gradient = Callable[[MetaParams, Task, jax.Array], tuple[tuple[jax.Array, Any], MetaParams]]
"""`(meta_params, tasks, step) -> ((loss, (aux, AdaptInfo)), gradient)` for a group of tasks `[G, ...]`: loss and
gradient summed over the group, aux and info of each task. `step` is the number of previous meta-steps."""

StepWeights = Sequence[float] | jax.Array | Callable[[jax.Array], jax.Array]


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

    Example:
      >>> import jax, jax.numpy as jnp, maml_jax, optax
      >>> def loss_fn(w, batch):  # A linear model with one weight.
      ...     x, y = batch
      ...     return jnp.mean((w * x - y) ** 2), {}
      >>> learner = maml_jax.maml(loss_fn, inner=maml_jax.sgd(0.1, steps=1), outer=optax.sgd(0.5))
      >>> state = learner.init(jnp.array(0.0))
      >>> x, slopes = jnp.ones((2, 1)), jnp.array([[1.0], [3.0]])  # Two tasks, one example each.
      >>> tasks = maml_jax.Task(support=(x, slopes), query=(x, slopes))
      >>> for _ in range(20):
      ...     state, info = jax.jit(learner.step)(state, tasks)
      >>> print(f"{state.params:.2f}")  # Half way between the tasks.
      2.00

    Args:
      loss_fn: `(params, batch) -> (scalar loss, aux)`, for one task.
      inner: the inner learner, such as `sgd(0.01, steps=1)`.
      outer: an optax optimizer that does not evaluate the loss itself (the line search of `optax.lbfgs` does). It
        updates `params`, or `MetaParams(params, inner_params)` if the inner learner has learned parameters.
      query_loss_fn: the loss of the query set; None means `loss_fn`.
      step_weights: weights `[S + 1]` of the query losses before the first inner step and after each step, or a function
        from the meta-step to these weights, such as `multi_step_weights`. The meta-loss is the weighted sum (multi-step
        loss of MAML++). None: the meta-loss is the query loss after the last step.
      task_batch_size: number of tasks computed together; a loop runs over groups of this size. 1 needs the least
        memory, 'all' has the least overhead. None chooses by backend and number of parameters. The results are equal
        up to rounding.
      mesh: the devices that share the tasks, such as `task_mesh(T)`; None uses one device.

    Returns:
      A `MetaLearner`.

    Raises:
      TypeError, ValueError: for arguments that are not allowed; when the functions of the learner are traced, for tasks
        whose leaves have different leading axes, and for a loss that does not return `(scalar, aux)`.

    References:
      Finn, Abbeel and Levine 2017, arXiv:1703.03400; Antoniou et al. 2019, arXiv:1810.09502, section 4 (multi-step
      loss).
    """
    validation.inner("inner", inner, InnerLearner)
    if step_weights is not None and not callable(step_weights):
        validation.weights("step_weights", step_weights, inner.steps + 1)
    support_loss = validation.checked_loss(loss_fn)
    query_loss = validation.checked_loss(query_loss_fn or loss_fn)

    # Differentiate the sum of the losses, and do not sum the gradients of the tasks: one matrix product then gives the
    # gradient of parameters that the tasks share.
    loss_of_task = partial(task_loss, support_loss, query_loss, inner, step_weights=step_weights)
    gradient = jax.value_and_grad(sum_over_tasks(loss_of_task), has_aux=True)
    return meta_learner(gradient, support_loss, query_loss, inner, outer, task_batch_size=task_batch_size, mesh=mesh)


def task_loss(
    support_loss: LossFn,
    query_loss: LossFn,
    inner: InnerLearner,
    meta_params: MetaParams,
    task: Task,
    step: int | jax.Array = 0,
    *,
    step_weights: StepWeights | None = None,
) -> tuple[jax.Array, Any]:
    """The meta-loss of one task: the query loss after adaptation (Finn et al. 2017, equation 1).

    Args:
      support_loss, query_loss, inner, step_weights: as for `maml`.
      meta_params: the parameters before adaptation, and the learned parameters of the inner update.
      task: one task, without a task axis.
      step: the number of previous meta-steps, for `step_weights` that depend on the meta-step.

    Returns:
      `(meta-loss, (aux of the query loss after adaptation, AdaptInfo))`. With `step_weights` the meta-loss is the
      weighted sum of the query losses along the inner steps.
    """
    if step_weights is None:
        adapted, info = inner_loop(inner, support_loss, *meta_params, task.support)
        loss, aux = query_loss(adapted, task.query)
        return loss, (aux, info)
    weights = step_weights(jnp.asarray(step)) if callable(step_weights) else step_weights
    if (shape := np.shape(weights)) != (inner.steps + 1,):
        raise ValueError(
            f"step_weights must be {inner.steps + 1} weights, one before the first inner step and one after each inner "
            f"step, but has the shape {shape}."
        )
    _, info = inner_loop(
        inner, support_loss, *meta_params, task.support, probe=lambda params: query_loss(params, task.query)
    )
    losses, aux = info.probes
    aux = jax.tree.map(lambda leaf: leaf[-1], aux)
    return jnp.vdot(jnp.asarray(weights, losses.dtype), losses), (aux, info._replace(probes=None))


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
    """Builds a `MetaLearner`. Its outer optimizer gets the mean of `gradient` over the tasks.

    Evaluation and adaptation use only the inner loop, not `gradient`.

    Args:
      gradient: the meta-gradient of a group of tasks.
      support_loss, query_loss, inner, outer, task_batch_size, mesh: as for `maml`.
      learns_inner_params: whether `gradient` differentiates learned parameters of the inner update. If False, `init`
        raises ValueError for an inner learner with learned parameters.
    """
    validation.transformation("outer", outer)
    over_tasks = task_axis(task_batch_size, mesh)

    def init(params: Params) -> MetaState:
        state = init_state(inner, params, lambda meta_params: outer.init(_updated(meta_params)), over_tasks)
        if not learns_inner_params and jax.tree.leaves(state.inner_params):
            raise ValueError(
                "This algorithm has no gradient for learned parameters of the inner update, such as learned rates: "
                "use an inner learner without them."
            )
        return state

    def step(state: MetaState, tasks: Task) -> tuple[MetaState, MetaInfo]:
        # Adapt to every task, and average the tasks' meta-gradients.
        (loss, (aux, info)), grads = over_tasks.mean(gradient, state.meta_params, tasks, state.step)
        grad_norm = optax.tree.norm(jax.tree.map(_at_least_float32, grads))  # A float16 norm overflows at 65,504.
        # One step of the outer optimizer.
        before = _updated(state.meta_params)
        updates, opt_state = update(outer, _updated(grads), state.opt_state, before, loss)
        params, inner_params = _as_pair(optax.apply_updates(before, updates))
        return MetaState(state.step + 1, params, inner_params, opt_state), MetaInfo(loss, aux, info.loss, grad_norm)

    def evaluate(state: MetaState, tasks: Task, steps: int | None = None, *, only_last: bool = False) -> Evaluation:
        validation.num_tasks(tasks)
        if steps is not None:
            validation.at_least("steps", steps, 0)
        return run_evaluate(state.meta_params, tasks, steps, only_last)

    @partial(jax.jit, static_argnums=(2, 3))  # Compiled here, so that the caller need not use jax.jit.
    def run_evaluate(meta_params: MetaParams, tasks: Task, steps: int | None, only_last: bool) -> Evaluation:
        def one_task(meta_params: MetaParams, task: Task) -> Evaluation:
            def probe(params: Params) -> Evaluation:
                return Evaluation(*query_loss(params, task.query), support_loss(params, task.support)[0])

            along = None if only_last else probe
            params, info = inner_loop(inner, support_loss, *meta_params, task.support, steps=steps, probe=along)
            return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], probe(params)) if only_last else info.probes

        return over_tasks.map(one_task, meta_params, tasks)

    def adapt(state: MetaState, batch: Batch, steps: int | None = None) -> tuple[Params, AdaptInfo]:
        if steps is not None:
            validation.at_least("steps", steps, 0)
        return run_adapt(state.meta_params, batch, steps)

    @partial(jax.jit, static_argnums=2)
    def run_adapt(meta_params: MetaParams, batch: Batch, steps: int | None) -> tuple[Params, AdaptInfo]:
        return inner_loop(inner, support_loss, *meta_params, batch, steps=steps)

    return MetaLearner(init, step, evaluate, adapt)


def init_state(
    inner: InnerLearner, params: Params, init_optimizer: Callable[[MetaParams], Any], over_tasks: TaskAxis
) -> MetaState:
    """The state before the first meta-step, on all devices.

    Args:
      inner: the inner learner, with the initial values of the learned parameters of the inner update.
      params: the initial parameters. The state holds copies, so donating the state does not delete `params`.
      init_optimizer: `MetaParams -> state of the outer optimizer`.
      over_tasks: copies the state to all devices.

    Raises:
      TypeError, ValueError: if a parameter is not a floating-point array, or there is none.
    """
    validation.floating_params(params)
    params = jax.tree.map(jnp.array, params)
    meta_params = MetaParams(params, inner.init_inner_params(adapted_part(inner, params)))
    # The optimizer gets copies: it may keep its inputs in its state, and no array can be donated twice.
    opt_state = init_optimizer(jax.tree.map(jnp.array, meta_params))
    return over_tasks.replicate(MetaState(jnp.zeros([], jnp.int32), *meta_params, opt_state))


def _updated(meta_params: MetaParams) -> Any:
    """The pytree that the outer optimizer updates: `params` alone if there are no learned inner parameters."""
    return meta_params if jax.tree.leaves(meta_params.inner_params) else meta_params.params


def _at_least_float32(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _as_pair(updated: Any) -> MetaParams:
    return updated if isinstance(updated, MetaParams) else MetaParams(updated)
