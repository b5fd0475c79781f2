"""The inner loop: a few optimizer steps from the meta-parameters on the support set of one task.

`inner_loop` is the only inner loop of the library. First and second order, training and evaluation, one step or
many, gradient descent and any other optax optimizer go through it. An `InnerLearner` holds the choices.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from maml_jax import validation
from maml_jax.autodiff.forward_over_reverse import forward_over_reverse
from maml_jax.autodiff.hoist import hoist
from maml_jax.autodiff.trees import Mask, combine, partition
from maml_jax.types import AdaptInfo, Batch, InnerParams, LossFn, Params

Order = Literal[1, 2]
"""2 differentiates through the inner gradients: the exact meta-gradient. 1 treats them as constants: FOMAML."""

Remat = Literal["none", "full", "mixflow"]
"""What each inner step stores for the second-order meta-gradient. All three give the same meta-gradient.
'none' stores all intermediate values. 'full' stores the parameters before the step and recomputes the rest.
'mixflow' stores the same and differentiates the inner gradient in forward mode (MixFlow-MG, arXiv:2505.00793)."""

Start = Callable[[Params, Batch], Params]
"""`(params, support) -> params` with the same structure and shapes, such as a head made from prototypes."""

ParamsAtStep = Callable[[Params, jax.Array], Params]
"""`(params, step) -> params` that the loss takes at that inner step, such as one of several copies."""

LearnRates = Literal["parameter", "layer", "layer_step"]
"""What has a learned inner rate of its own: every single 'parameter' (Meta-SGD, arXiv:1707.09835), every array of
parameters, here called 'layer', or every array at every inner step (MAML++, arXiv:1810.09502)."""


class InnerOptions(TypedDict, total=False):
    """The options that every inner learner takes, whatever its optimizer."""

    order: Order
    """2, the default, for the exact meta-gradient; 1 for the first-order approximation (FOMAML)."""
    trainable: Mask | None
    """Which parameters the inner loop adapts: a pytree of bools, or a function from the parameters to one. The other
    parameters are meta-learned and not adapted (ANIL, arXiv:1909.09157, adapts the head alone). None adapts all."""
    remat: Remat
    """What each inner step stores for the second-order meta-gradient: 'none' (the default), 'full' or 'mixflow'.
    'mixflow' does not differentiate through the aux of the support loss."""
    start: Start | None
    """Where a task starts from, given the parameters and its support set, such as `heads.shared()`."""
    params_at_step: ParamsAtStep | None
    """The parameters that the loss takes at each inner step, such as `maml_plus_plus.select_step(mask)`."""


class InnerLearner(NamedTuple):
    """How one task is learned. Make one with `sgd`, `unrolled`, `meta_curvature` or `no_adaptation`."""

    optimizer: Callable[[InnerParams], optax.GradientTransformation]
    """The optimizer of the inner loop, given its meta-learned parameters."""
    init_inner_params: Callable[[Params], InnerParams]
    """Initial values of the optimizer's meta-learned parameters, given the adapted parameters; `()` for none."""
    steps: int
    """Inner steps in meta-training. Evaluation may take another number."""
    order: Order = 2
    """See `InnerOptions`, as for all fields below."""
    trainable: Mask | None = None
    remat: Remat = "none"
    start: Start | None = None
    params_at_step: ParamsAtStep | None = None


def sgd(
    learning_rate: float | jax.Array,
    *,
    steps: int,
    learn_rates: LearnRates | None = None,
    **options: Unpack[InnerOptions],
) -> InnerLearner:
    """Gradient descent, the inner update of MAML.

    Example:
      >>> import maml_jax
      >>> maml_jax.sgd(0.01, steps=5).order  # Exact second order.
      2
      >>> maml_jax.sgd(0.01, steps=5, order=1).order  # First-order MAML.
      1
      >>> meta_sgd = maml_jax.sgd(0.01, steps=1, learn_rates="parameter")

    Args:
      learning_rate: the inner step size, for the loss that `maml` is given. For a loss that is N times larger, the
        same update needs a rate N times smaller (see `losses.rate_for_mean_loss`).
      steps: inner steps in meta-training, at least 1.
      learn_rates: meta-learns the rates, starting from `learning_rate`: one for every 'parameter' (Meta-SGD), 'layer'
        or 'layer_step' (MAML++; inner steps beyond those of training take the last step's rates).
      **options: `order`, `trainable`, `remat`, `start` and `params_at_step`, see `InnerOptions`.

    Raises:
      ValueError: for a rate that is not positive and finite, fewer than 1 step, an option that is not allowed, or
        `remat` with order 1, which stores nothing of the inner steps.

    References:
      Finn, Abbeel and Levine 2017, arXiv:1703.03400, section 2.2; Li et al. 2017, arXiv:1707.09835 (Meta-SGD).
    """
    validation.positive("learning_rate", learning_rate)
    if not learn_rates:
        return unrolled(optax.sgd(learning_rate), steps=steps, **options)
    validation.one_of("learn_rates", learn_rates, get_args(LearnRates))

    def init_inner_params(adapted: Params) -> InnerParams:
        shape = {"parameter": None, "layer": (), "layer_step": (steps,)}[learn_rates]
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, learning_rate, shape=shape), adapted)

    def optimizer(rates: InnerParams) -> optax.GradientTransformation:
        def update(grads, step, params=None):
            current = rates
            if learn_rates == "layer_step":
                current = jax.tree.map(lambda rate: rate[jnp.minimum(step, len(rate) - 1)], rates)
            return jax.tree.map(lambda rate, g: -rate * g, current, grads), step + 1

        return optax.GradientTransformation(lambda params: jnp.zeros([], jnp.int32), update)

    return inner_learner(optimizer, init_inner_params, steps=steps, **options)


def unrolled(optimizer: optax.GradientTransformation, *, steps: int, **options: Unpack[InnerOptions]) -> InnerLearner:
    """Any optax optimizer as the inner update, differentiated through its unrolled steps.

    The optimizer starts with a new state for every task. Adam needs `eps_root > 0`: without it, the derivative of its
    square root at a gradient of zero is NaN.

    Example:
      >>> import maml_jax, optax
      >>> inner = maml_jax.unrolled(optax.adam(0.01, eps_root=1e-8), steps=5)

    Args:
      optimizer: an optax transformation that includes the learning rate. It must not evaluate the loss itself, as the
        line search of `optax.lbfgs` does.
      steps: inner steps in meta-training, at least 1.
      **options: see `InnerOptions`.

    Raises:
      TypeError: if `optimizer` is not an optax transformation.
      ValueError: as `sgd`.
    """
    validation.transformation("optimizer", optimizer)
    return inner_learner(lambda _: optimizer, lambda _: (), steps=steps, **options)


def inner_learner(
    optimizer: Callable[[InnerParams], optax.GradientTransformation],
    init_inner_params: Callable[[Params], InnerParams],
    *,
    steps: int,
    **options: Unpack[InnerOptions],
) -> InnerLearner:
    """An `InnerLearner` whose optimizer is itself meta-learned: the general form of `sgd` and `unrolled`.

    Args:
      optimizer: the optax transformation, given its meta-learned parameters.
      init_inner_params: their initial values, given the adapted parameters.
      steps: inner steps in meta-training, at least 1.
      **options: see `InnerOptions`.
    """
    learner = InnerLearner(optimizer, init_inner_params, steps, **options)
    validation.at_least("steps", steps, 1)
    validation.one_of("order", learner.order, (1, 2))
    validation.one_of("remat", learner.remat, get_args(Remat))
    if learner.order == 1 and learner.remat != "none":
        raise ValueError(
            f"remat={learner.remat!r} is for order 2. Order 1 stores nothing of the inner steps: leave remat out."
        )
    return learner


def no_adaptation() -> InnerLearner:
    """No inner step: meta-training becomes joint training on all tasks, the paper's 'pretrained' baseline.

    Evaluation with this learner leaves the parameters as they are. To fine-tune them, evaluate with another learner.
    """
    return InnerLearner(lambda _: optax.set_to_zero(), lambda _: (), steps=0)


def inner_loop(
    inner: InnerLearner,
    loss_fn: LossFn,
    params: Params,
    inner_params: InnerParams,
    batch: Batch,
    *,
    steps: int | None = None,
    probe: Callable[[Params], Any] | None = None,
    batch_per_step: bool = False,
) -> tuple[Params, AdaptInfo]:
    """Adapts `params` to one task (paper, algorithms 1 and 3, lines 5-6).

    Args:
      inner: how to adapt.
      loss_fn: the support loss.
      params: the parameters before adaptation.
      inner_params: learned parameters of the update, from `inner.init_inner_params`.
      batch: the support set of one task, without a task axis.
      steps: number of inner steps, 0 or more; None takes `inner.steps`.
      probe: a function of the parameters, called before the first step and after each step, for evaluation.
      batch_per_step: every leaf of `batch` has a leading axis `[steps]`: each step has a batch of its own, such as the
        episodes sampled before it in reinforcement learning. `inner.start` is given the whole of `batch`.

    Returns:
      The adapted parameters, in the form that the loss takes after the last step, and an `AdaptInfo`.
    """
    steps = inner.steps if steps is None else steps

    # Where the task starts from, and which parameters it adapts.
    if inner.start is not None:
        params = _started(inner.start, params, batch)
    adapted, fixed = partition(params, inner.trainable)

    # The support loss, as a function of the adapted parameters and of everything else.
    def effective_params(adapted: Params, fixed: Params, step: Any) -> Params:
        params = combine(adapted, fixed)
        return params if inner.params_at_step is None else inner.params_at_step(params, step)

    def support_loss(adapted: Params, others: Any) -> tuple[jax.Array, Any]:
        fixed, batch, step = others
        return loss_fn(effective_params(adapted, fixed, step), batch)

    # Its gradient. Both forms give the same derivatives; 'mixflow' stores less of the gradient's computation.
    if inner.remat == "mixflow" and inner.order == 2:
        value_and_grad = forward_over_reverse(support_loss)
    else:
        value_and_grad = jax.value_and_grad(support_loss, has_aux=True)

    optimizer = inner.optimizer(inner_params)
    observe = probe or (lambda _: None)

    def inner_step(carry, scan_inputs):
        adapted, opt_state = carry
        step, step_batch = scan_inputs
        probed = observe(effective_params(adapted, fixed, step))
        # The gradient of the support loss.
        others = (fixed, step_batch if batch_per_step else batch, step)
        (loss, aux), grads = value_and_grad(adapted, others)
        # First order: the gradient, and all else that the optimizer is given, are constants. The update becomes a
        # constant shift of the parameters. Learned rates still get their gradient, as the update multiplies by them.
        given = (grads, adapted, loss)
        grads, given_params, given_loss = lax.stop_gradient(given) if inner.order == 1 else given
        # The update of the parameters.
        updates, opt_state = update(optimizer, grads, opt_state, given_params, given_loss)
        return (optax.apply_updates(adapted, updates), opt_state), (loss, aux, probed)

    carry = (adapted, optimizer.init(lax.stop_gradient(adapted) if inner.order == 1 else adapted))
    scan_inputs = (None if inner.params_at_step is None else jnp.arange(steps), batch if batch_per_step else None)
    first_inputs = jax.tree.map(lambda leaf: leaf[0], scan_inputs) if steps else scan_inputs

    # Compute what is the same in all steps once, before the first.
    if steps > 1 and not jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        carry = _strongly_typed(carry, jax.eval_shape(inner_step, carry, first_inputs)[0])
        inner_step = hoist(inner_step, carry, first_inputs)
    if inner.remat == "full":
        inner_step = jax.checkpoint(inner_step, prevent_cse=steps == 1)

    if steps == 1:
        # Without a loop. In a loop each task would have parameters of its own from the start; here the tasks of a
        # `vmap` still share them, and the products of all tasks with them are one product.
        (adapted, _), metrics = inner_step(carry, first_inputs)
        loss, aux, probes = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], metrics)
    else:
        # A loop, so that compile time does not grow with the number of steps.
        (adapted, _), (loss, aux, probes) = lax.scan(inner_step, carry, scan_inputs, length=steps)

    params = effective_params(adapted, fixed, steps)
    return params, AdaptInfo(loss, aux, _append(probes, observe(params)))


def adapt(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    *,
    learning_rate: float | jax.Array,
    steps: int,
) -> tuple[Params, AdaptInfo]:
    """Adapts parameters to one batch by gradient descent: one line for a new task.

    Example:
      >>> import jax.numpy as jnp, maml_jax
      >>> loss_fn = lambda w, batch: (jnp.mean((batch[0] * w - batch[1]) ** 2), {})
      >>> batch = (jnp.array([1.0, 2.0]), jnp.array([3.0, 6.0]))
      >>> w, info = maml_jax.adapt(loss_fn, jnp.array(0.0), batch, learning_rate=0.1, steps=10)
      >>> print(f"{w:.2f}, loss {info.loss[0]:.1f} -> {info.loss[-1]:.1f}")
      3.00, loss 22.5 -> 0.0

    Args:
      loss_fn: `(params, batch) -> (scalar loss, aux)`.
      params: meta-trained parameters, `state.params`.
      batch: the support set of one task, without a task axis.
      learning_rate: step size, for the loss that `loss_fn` returns.
      steps: gradient steps, at least 1.

    Returns:
      The adapted parameters, and an `AdaptInfo` whose `loss` `[steps + 1]` and `aux` are the loss and aux of `batch`
      before the first step and after each step.

    Raises:
      ValueError, TypeError: for a rate or a number of steps that is not allowed, and for a `loss_fn` that does not
        return `(scalar loss, aux)`.
    """
    sgd(learning_rate, steps=steps)  # Raises for a rate or a number of steps that is not allowed.
    validation.floating_params(params)
    return _adapt(_SameFunction(validation.checked_loss(loss_fn), loss_fn), params, batch, learning_rate, steps)


class _SameFunction:
    """A function, equal to another if both are the same object: so that any callable can be a static argument."""

    def __init__(self, fn: Callable[..., Any], identity: Callable[..., Any]):
        self.fn, self.identity = fn, identity

    def __hash__(self) -> int:
        return id(self.identity)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SameFunction) and self.identity is other.identity


@partial(jax.jit, static_argnums=(0, 4))  # Compiled once for a loss function and shapes, also where no caller jits.
def _adapt(
    loss: _SameFunction, params: Params, batch: Batch, learning_rate: Any, steps: int
) -> tuple[Params, AdaptInfo]:
    params, info = inner_loop(sgd(learning_rate, steps=steps), loss.fn, params, (), batch)
    return params, AdaptInfo(*_append((info.loss, info.aux), loss.fn(params, batch)))


def adapted_part(inner: InnerLearner, params: Params) -> Params:
    """The parameters that the inner loop adapts, in the structure of `params` with None for the others."""
    return partition(params, inner.trainable)[0]


def update(
    optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Params, loss: jax.Array
) -> tuple[Any, Any]:
    """`optimizer.update`, with the loss and the gradient by name for optimizers that take them, such as Polyak's."""
    takes = inspect.signature(optimizer.update).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    by_name = {"value": loss, "grad": grads}
    return optimizer.update(
        grads, opt_state, params, **{name: value for name, value in by_name.items() if takes_all or name in takes}
    )


def _strongly_typed(carry: Any, after: Any) -> Any:
    """Converts the weakly typed leaves of `carry` to the types that they have after a step, as a scan requires."""

    def strong(before: Any, after: Any) -> Any:
        return lax.convert_element_type(before, after.dtype) if jax.typeof(before).weak_type else before

    return jax.tree.map(strong, carry, after)


def _started(start: Start, params: Params, batch: Batch) -> Params:
    """`start(params, batch)`, checked to keep the structure, shapes and types of the parameters."""
    started = start(params, batch)
    forms = [jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree) for tree in (started, params)]
    if forms[0] != forms[1]:
        raise ValueError(
            f"start must return parameters of the same structure, shapes and types as it is given, {forms[1]}, but "
            f"returned {forms[0]}."
        )
    return started


def _append(stacked: Any, last: Any) -> Any:
    """Adds one row to the leading axis of every leaf."""
    return jax.tree.map(lambda rows, row: jnp.concatenate([rows, jnp.asarray(row)[None]]), stacked, last)
