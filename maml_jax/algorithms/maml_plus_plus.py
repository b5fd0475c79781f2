"""MAML++: MAML with five changes that make its training stable (Antoniou et al. 2019).

1. Learned rates: one rate for each array of parameters and each inner step (`per_step_sgd`).
2. Parameters per inner step, usually the parameters of normalisations (`replicate_per_step`, `select_step`).
3. Multi-step loss: a weighted sum of the query losses after every inner step. The weights move to the last inner step
   during training (`multi_step_weights`).
4. Derivative-order annealing: early meta-steps are first order, later meta-steps second order (`switch_learner`).
5. Cosine schedule: the outer learning rate decreases along a cosine.

The running statistics of MAML++ are in `running_statistics`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from maml_jax import validation
from maml_jax.autodiff.trees import Mask, mask_tree
from maml_jax.inner import InnerLearner, Order, ParamsAtStep, Remat, sgd
from maml_jax.meta import MetaLearner, maml
from maml_jax.parallel.task_axis import TaskBatchSize
from maml_jax.types import LossFn, MetaInfo, MetaState, Params, Task


def maml_plus_plus(
    loss_fn: LossFn,
    *,
    learning_rate: float | jax.Array,
    steps: int,
    meta_steps: int,
    outer: optax.GradientTransformation | None = None,
    order: Order = 2,
    trainable: Mask | None = None,
    per_step: Mask | None = None,
    multi_step_until: int | None = None,
    first_order_until: int | None = None,
    remat: Remat = "none",
    query_loss_fn: LossFn | None = None,
    task_batch_size: TaskBatchSize = None,
    mesh: Mesh | None = None,
) -> MetaLearner:
    """MAML++ as one function (Antoniou et al. 2019, section 4).

    `init(params)` takes the parameters of the model. In `params`, the state holds `S + 1` copies `[S + 1, ...]` of each
    array that `per_step` selects. In `inner_params`, it holds the learned rates, `[S]` for each adapted array.

    Example:
      >>> import jax, jax.numpy as jnp, maml_jax
      >>> def loss_fn(params, batch):
      ...     inputs, targets = batch
      ...     outputs = params["slope"] * inputs + params["offset"]
      ...     return jnp.mean((outputs - targets) ** 2), {}
      >>> learner = maml_jax.maml_plus_plus(
      ...     loss_fn, learning_rate=0.1, steps=3, meta_steps=100,
      ...     trainable={"slope": True, "offset": False}, per_step={"slope": False, "offset": True},
      ... )
      >>> state = learner.init({"slope": jnp.array(1.0), "offset": jnp.array(0.0)})
      >>> state.params["offset"].shape, state.inner_params["slope"].shape
      ((4,), (3,))
      >>> inputs = jnp.linspace(-1, 1, 8).reshape(2, 4)
      >>> tasks = maml_jax.Task(support=(inputs, 2 * inputs), query=(inputs, 2 * inputs))
      >>> state, info = jax.jit(learner.step)(state, tasks)
      >>> info.support_loss.shape
      (2, 3)

    Args:
      loss_fn: `(params, batch) -> (scalar loss, aux)`, of one task.
      learning_rate: initial value of the learned rates, for the loss that `loss_fn` returns.
      steps: inner steps in training, S. If evaluation takes more steps, they use the rates of step S.
      meta_steps: number of meta-steps in training, which sets the length of the three schedules.
      outer: the outer optimizer, any optax transformation. None: Adam with a rate that decreases from 1e-3 to 1e-5
        along a cosine over `meta_steps`.
      order: 2 anneals the order of the derivative from 1 to 2; 1 trains with first order throughout.
      trainable: mask of the parameters that the inner loop adapts, as for `sgd`. None: all.
      per_step: mask of the parameters with one copy per inner step, such as `models.norms_only`: a pytree of bools, or
        a function from the parameters to a pytree of bools. None: no such parameters.
      multi_step_until: first meta-step in which only the query loss after the last inner step counts, at least 1.
        None: a tenth of `meta_steps`.
      first_order_until: number of meta-steps with first order, at least 1. None: half of `meta_steps`.
      remat: what each inner step stores for the second-order meta-gradient, as for `sgd`.
      query_loss_fn, task_batch_size, mesh: as for `maml`.

    Returns:
      A `MetaLearner`.

    Raises:
      TypeError, ValueError: as `sgd` and `maml`, and if `meta_steps`, `multi_step_until` or `first_order_until` is
        below 1.

    References:
      Antoniou, Edwards and Storkey 2019, How to train your MAML, arXiv:1810.09502.
    """
    validation.at_least("meta_steps", meta_steps, 1)
    if multi_step_until is None:
        multi_step_until = max(1, meta_steps // 10)
    if first_order_until is None:
        first_order_until = max(1, meta_steps // 2)
    if outer is None:
        outer = optax.adam(optax.cosine_decay_schedule(1e-3, meta_steps, alpha=0.01))
    step_weights = multi_step_weights(steps, until=multi_step_until)

    def learner_of_order(order: Order) -> MetaLearner:
        inner = per_step_sgd(
            learning_rate,
            steps=steps,
            order=order,
            trainable=trainable,
            per_step=per_step,
            remat=remat if order == 2 else "none",
        )
        return maml(
            loss_fn,
            inner,
            outer,
            query_loss_fn=query_loss_fn,
            step_weights=step_weights,
            task_batch_size=task_batch_size,
            mesh=mesh,
        )

    learner = learner_of_order(order)
    if order == 2:
        learner = switch_learner(learner_of_order(1), learner, after=first_order_until)

    def init(params: Params) -> MetaState:
        return learner.init(params if per_step is None else replicate_per_step(params, per_step, steps))

    return learner._replace(init=init)


def per_step_sgd(
    learning_rate: float | jax.Array,
    *,
    steps: int,
    order: Order = 2,
    trainable: Mask | None = None,
    per_step: Mask | None = None,
    remat: Remat = "none",
) -> InnerLearner:
    """The inner learner of MAML++: one learned rate for each array and step, and copies of parameters for each step.

    Args:
      learning_rate, steps, order, trainable, remat: as for `sgd`.
      per_step: mask of the parameters that `replicate_per_step` has replicated; None: no such parameters.

    Raises:
      TypeError, ValueError: as `sgd`.
    """
    return sgd(
        learning_rate,
        steps=steps,
        order=order,
        learn_rates="layer_step",
        trainable=trainable,
        remat=remat,
        params_at_step=None if per_step is None else select_step(per_step),
    )


def replicate_per_step(params: Params, per_step: Mask, steps: int) -> Params:
    """Replaces each array that `per_step` selects with `steps + 1` equal copies, `[...] -> [steps + 1, ...]`.

    The loss after i inner steps uses copy i.

    Raises:
      ValueError: for fewer than 1 step, and for a mask that does not fit the parameters.
    """
    validation.at_least("steps", steps, 1)
    mask = mask_tree("per_step", per_step, params)
    return jax.tree.map(lambda leaf, copied: jnp.stack([leaf] * (steps + 1)) if copied else leaf, params, mask)


def select_step(per_step: Mask) -> ParamsAtStep:
    """Returns a function that selects the copies of an inner step, `[S + 1, ...] -> [...]`.

    The function is for the option `params_at_step` of an inner learner. Steps after S use the last copy.
    """

    def params_at_step(params: Params, step: jax.Array) -> Params:
        mask = mask_tree("per_step", per_step, params)
        return jax.tree.map(
            lambda leaf, copied: leaf[jnp.minimum(step, len(leaf) - 1)] if copied else leaf, params, mask
        )

    return params_at_step


def multi_step_weights(steps: int, until: int) -> Callable[[jax.Array], jax.Array]:
    """Annealed weights of the multi-step loss: first equal for all inner steps, finally 1 for the last inner step.

    Example:
      >>> weights = multi_step_weights(steps=2, until=100)
      >>> [weights(step).tolist() for step in (0, 50, 100)]
      [[0.0, 0.5, 0.5], [0.0, 0.25, 0.75], [0.0, 0.0, 1.0]]

    Args:
      steps: inner steps, S.
      until: first meta-step in which only the query loss after the last inner step counts. Before, the weights of the
        other steps decrease linearly from 1 / S to 0.

    Returns:
      A function from the meta-step to weights `[S + 1]` with sum 1, for the argument `step_weights` of `maml`. The
      weights have JAX's default floating-point type.

    Raises:
      ValueError: if `steps` or `until` is below 1.

    References:
      Antoniou, Edwards and Storkey 2019, How to train your MAML, arXiv:1810.09502, section 4.
    """
    validation.at_least("steps", steps, 1)
    validation.at_least("until", until, 1)

    def weights(step: jax.Array) -> jax.Array:
        others = jnp.clip(1 - jnp.asarray(step, float) / until, 0) / steps
        return jnp.full(steps + 1, others).at[0].set(0).at[-1].set(1 - (steps - 1) * others)

    return weights


def switch_learner(first: MetaLearner, then: MetaLearner, *, after: int) -> MetaLearner:
    """A learner whose first `after` meta-steps are steps of `first`, and whose later meta-steps are steps of `then`.

    Both learners need the same parameters, learned inner parameters and outer optimizer. `init`, `evaluate` and `adapt`
    are the functions of `then`.

    Raises:
      ValueError: if `after` is below 1.
    """
    validation.at_least("after", after, 1)

    def step(state: MetaState, tasks: Task) -> tuple[MetaState, MetaInfo]:
        return jax.lax.cond(state.step < after, first.step, then.step, state, tasks)

    return then._replace(step=step)
