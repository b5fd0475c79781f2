"""The inner loop: a few optimizer steps from the meta-parameters on the support set of one task.

`inner_loop` is the only inner loop of the library. Training and evaluation, first and second order, and all optimizers
use this function. An `InnerLearner` holds the options.
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
"""2: exact meta-gradient, differentiated through the inner gradients. 1: inner gradients as constants (FOMAML)."""

Remat = Literal["none", "full", "mixflow"]
"""What each inner step stores for the second-order meta-gradient. All three give the same meta-gradient.
'none' stores all intermediate values. 'full' stores the parameters before the step and recomputes the rest.
'mixflow' stores these parameters too, and differentiates the inner gradient in forward mode (MixFlow-MG,
arXiv:2505.00793)."""

Start = Callable[[Params, Batch], Params]
"""`(params, support) -> params` before the first inner step, with unchanged structure, shapes and types."""

ParamsAtStep = Callable[[Params, jax.Array], Params]
"""`(params, step) -> params`: the input of the loss at inner step `step`, such as one of several copies."""

LearnRates = Literal["parameter", "layer", "layer_step"]
"""'parameter': one learned rate for every number (Meta-SGD, arXiv:1707.09835). 'layer': one for every array of
parameters. 'layer_step': one for every array and inner step (MAML++, arXiv:1810.09502)."""


class InnerOptions(TypedDict, total=False):
    """The options of all inner learners."""

    order: Order
    """2, the default, for the exact meta-gradient; 1 for the first-order approximation (FOMAML)."""
    trainable: Mask | None
    """The parameters that the inner loop adapts: a pytree of bools, or a function from parameters to a pytree of bools.
    The others are meta-learned but not adapted (ANIL, arXiv:1909.09157, adapts only the head). None adapts all."""
    remat: Remat
    """What each inner step stores for the second-order meta-gradient: 'none' (the default), 'full' or 'mixflow'.
    'mixflow' does not differentiate through the aux of the support loss."""
    start: Start | None
    """A function that computes the parameters before the first inner step, such as `heads.shared()`."""
    params_at_step: ParamsAtStep | None
    """The parameters that the loss takes at each inner step, such as `maml_plus_plus.select_step(mask)`."""


class InnerLearner(NamedTuple):
    """The inner loop of one task. Create it with `sgd`, `unrolled`, `meta_curvature` or `no_adaptation`."""

    optimizer: Callable[[InnerParams], optax.GradientTransformation]
    """`inner_params -> optimizer` of the inner loop."""
    init_inner_params: Callable[[Params], InnerParams]
    """`adapted parameters -> initial inner_params`; `()` if the optimizer has no meta-learned parameters."""
    steps: int
    """Inner steps in meta-training. Evaluation may take more or fewer steps."""
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
      learn_rates: meta-learns rates with the initial value `learning_rate`, see `LearnRates`. With 'layer_step', inner
        steps after the last step of training use the rates of this step. None: the rate is fixed.
      **options: `order`, `trainable`, `remat`, `start` and `params_at_step`, see `InnerOptions`.

    Raises:
      ValueError: if the rate is not positive and finite, `steps` is below 1, an option has a value that is not allowed,
        or `remat` is not 'none' with order 1.

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

    The optimizer starts with a new state for every task. Adam needs `eps_root > 0`. With `eps_root=0`, the derivative
    of Adam's square root is NaN at a gradient of zero.

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
      ValueError: for `steps` and options, as in `sgd`.
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
    """An `InnerLearner` whose optimizer has meta-learned parameters: the general form of `sgd` and `unrolled`.

    Args:
      optimizer: `inner_params -> optax transformation`.
      init_inner_params: `adapted parameters -> initial inner_params`.
      steps, **options: as for `sgd`, with the same errors.
    """
    learner = InnerLearner(optimizer, init_inner_params, steps, **options)
    validation.at_least("steps", steps, 1)
    validation.one_of("order", learner.order, (1, 2))
    validation.one_of("remat", learner.remat, get_args(Remat))
    if learner.order == 1 and learner.remat != "none":
        raise ValueError(f"remat={learner.remat!r} is for order 2. Order 1 stores no intermediate values: omit remat.")
    return learner


def no_adaptation() -> InnerLearner:
    """No inner step: meta-training becomes joint training on all tasks, the paper's 'pretrained' baseline.

    Evaluation with this learner does not change the parameters. To fine-tune, evaluate with another inner learner.
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
    """Adapts `params` to one task (Finn et al. 2017, algorithm 1, lines 5-6).

    Args:
      inner: the optimizer, the number of steps and the options.
      loss_fn: the support loss.
      params: the parameters before adaptation.
      inner_params: learned parameters of the update, from `inner.init_inner_params`.
      batch: the support set of one task, without a task axis.
      steps: number of inner steps, 0 or more; None means `inner.steps`.
      probe: a function of the parameters, called before the first step and after each step, for evaluation.
      batch_per_step: whether every leaf of `batch` has a leading axis `[steps]`, with one batch for each inner step,
        such as the episodes sampled before the step in reinforcement learning. `inner.start` gets all batches.

    Returns:
      The adapted parameters (those of `inner.params_at_step` after the last step, if given), and an `AdaptInfo`.
    """
    steps = inner.steps if steps is None else steps

    # The parameters before the first step, split into adapted and fixed ones.
    if inner.start is not None:
        params = _started(inner.start, params, batch)
    adapted, fixed = partition(params, inner.trainable)

    # The support loss, as a function of the adapted parameters and of its other inputs.
    def effective_params(adapted: Params, fixed: Params, step: Any) -> Params:
        params = combine(adapted, fixed)
        return params if inner.params_at_step is None else inner.params_at_step(params, step)

    def support_loss(adapted: Params, others: Any) -> tuple[jax.Array, Any]:
        fixed, batch, step = others
        return loss_fn(effective_params(adapted, fixed, step), batch)

    # The gradient of the support loss. Both forms have the same derivatives; 'mixflow' stores fewer values.
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
        # First order: all inputs of the optimizer are constants, so the update shifts the parameters by a constant.
        # Learned rates still get a gradient, because the update multiplies by the rates.
        given = (grads, adapted, loss)
        grads, given_params, given_loss = lax.stop_gradient(given) if inner.order == 1 else given
        # The update of the parameters.
        updates, opt_state = update(optimizer, grads, opt_state, given_params, given_loss)
        return (optax.apply_updates(adapted, updates), opt_state), (loss, aux, probed)

    carry = (adapted, optimizer.init(lax.stop_gradient(adapted) if inner.order == 1 else adapted))
    scan_inputs = (None if inner.params_at_step is None else jnp.arange(steps), batch if batch_per_step else None)
    first_inputs = jax.tree.map(lambda leaf: leaf[0], scan_inputs) if steps else scan_inputs

    # Compute loop invariants once, before the first step.
    if steps > 1 and not jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        carry = _strongly_typed(carry, jax.eval_shape(inner_step, carry, first_inputs)[0])
        inner_step = hoist(inner_step, carry, first_inputs)
    if inner.remat == "full":
        inner_step = jax.checkpoint(inner_step, prevent_cse=steps == 1)

    if steps == 1:
        # One step needs no loop. In a loop, `vmap` would give each task a copy of the initial parameters. Without a
        # loop the tasks share these parameters, and one matrix product serves all tasks.
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
    """Adapts parameters to the support set of one new task by gradient descent.

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
      The adapted parameters, and an `AdaptInfo`. Its `loss` `[steps + 1]` and `aux` `[steps + 1, ...]` are those of
      `batch`, before the first step and after each step.

    Raises:
      ValueError: if the rate is not positive and finite, `steps` is below 1, or the loss is not a scalar.
      TypeError: if `loss_fn` does not return `(loss, aux)`, or a parameter is not a floating-point array.
    """
    sgd(learning_rate, steps=steps)  # Checks the arguments.
    validation.floating_params(params)
    return _adapt(_SameFunction(validation.checked_loss(loss_fn), loss_fn), params, batch, learning_rate, steps)


class _SameFunction:
    """Makes any callable a static argument of `jax.jit`: two instances are equal if `identity` is the same object."""

    def __init__(self, fn: Callable[..., Any], identity: Callable[..., Any]):
        self.fn, self.identity = fn, identity

    def __hash__(self) -> int:
        return id(self.identity)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SameFunction) and self.identity is other.identity


@partial(jax.jit, static_argnums=(0, 4))  # Compiled once for each loss function and each set of shapes.
def _adapt(
    loss: _SameFunction, params: Params, batch: Batch, learning_rate: Any, steps: int
) -> tuple[Params, AdaptInfo]:
    params, info = inner_loop(sgd(learning_rate, steps=steps), loss.fn, params, (), batch)
    return params, AdaptInfo(*_append((info.loss, info.aux), loss.fn(params, batch)))


def adapted_part(inner: InnerLearner, params: Params) -> Params:
    """The adapted parameters, in the structure of `params`, with None in place of the fixed parameters."""
    return partition(params, inner.trainable)[0]


def update(
    optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Params, loss: jax.Array
) -> tuple[Any, Any]:
    """Calls `optimizer.update`. An optimizer such as `optax.polyak_sgd` also gets the loss or the gradient by name."""
    takes = inspect.signature(optimizer.update).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    by_name = {"value": loss, "grad": grads}
    return optimizer.update(
        grads, opt_state, params, **{name: value for name, value in by_name.items() if takes_all or name in takes}
    )


def _strongly_typed(carry: Any, after: Any) -> Any:
    """Converts weakly typed leaves of `carry` to the types of `after`, the carry after a step, as a scan requires."""

    def strong(before: Any, after: Any) -> Any:
        return lax.convert_element_type(before, after.dtype) if jax.typeof(before).weak_type else before

    return jax.tree.map(strong, carry, after)


def _started(start: Start, params: Params, batch: Batch) -> Params:
    """Returns `start(params, batch)`. Raises ValueError if it changes the structure, shapes or types of `params`."""
    started = start(params, batch)
    forms = [jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree) for tree in (started, params)]
    if forms[0] != forms[1]:
        raise ValueError(
            f"start must return parameters of the same structure, shapes and types as its input, {forms[1]}, but "
            f"it returned {forms[0]}."
        )
    return started


def _append(stacked: Any, last: Any) -> Any:
    """Adds one row to the leading axis of every leaf."""
    return jax.tree.map(lambda rows, row: jnp.concatenate([rows, jnp.asarray(row)[None]]), stacked, last)
