"""Inner adaptation: a few optimizer steps from the meta-parameters on one task's support set.

There is one inner loop, `inner_loop`. First and second order, training and evaluation, one step or
many, gradient descent and any other optax transformation all go through it; an `InnerLearner` only
says which of these is wanted.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from maml_jax import validation
from maml_jax.autodiff.forward_over_reverse import forward_over_reverse
from maml_jax.autodiff.hoist import hoist
from maml_jax.autodiff.trees import Mask, combine, partition
from maml_jax.types import AdaptInfo, Batch, InnerParams, LossFn, Params

Remat = Literal["none", "full", "mixflow"]
"""What is kept of each inner step for the second-order meta-gradient. 'none': all that it computed. 'full':
where it began, and it is computed again. 'mixflow': where it began, and its derivative is taken forwards
over the gradient, not backwards (MixFlow-MG, Kemaev et al. 2025)."""


Start = Callable[[Params, Batch], Params]
"""`(params, support) -> params` of the same structure and shapes, such as a head made from prototypes (`heads`)."""

ParamsAtStep = Callable[[Params, jax.Array], Params]
"""`(params, step) -> params` as the loss takes them, such as one of several copies (`per_step`)."""

LearnRates = Literal["parameter", "layer", "layer_step"]
"""One learned rate for every single 'parameter' (Meta-SGD, Li et al. 2017), for every array of parameters,
here called 'layer', or for every array and inner step (MAML++, Antoniou et al. 2019)."""


class InnerLearner(NamedTuple):
    """How one task is learned, as a value. Build it with `sgd`, `unrolled`, `curvature.meta_curvature` or
    `no_adaptation`."""

    optimizer: Callable[[InnerParams], optax.GradientTransformation]
    """The optimizer of the inner loop, given the meta-learned rates."""
    init_inner_params: Callable[[Params], InnerParams]
    """The inner_params before meta-training, from the adapted part of the parameters; `()` when none is learned."""
    steps: int
    """Inner steps in meta-training; evaluation may take another number."""
    order: Literal[1, 2]
    """2 differentiates through the inner gradients; 1 treats them as constants."""
    trainable: Mask | None = None
    """Which parameters the inner loop adapts; None means all."""
    remat: Remat = "none"
    """What of the inner steps is kept for the meta-gradient."""
    start: Start | None = None
    """Where a task starts from, given the parameters and its support set; None: from the parameters as they are."""
    params_at_step: ParamsAtStep | None = None
    """What the loss is given of the parameters after so many steps; None: all, as they are."""


def sgd(
    learning_rate: float | jax.Array,
    *,
    steps: int,
    order: Literal[1, 2] = 2,
    learn_rates: LearnRates | None = None,
    trainable: Mask | None = None,
    remat: Remat = "none",
    start: Start | None = None,
    params_at_step: ParamsAtStep | None = None,
) -> InnerLearner:
    """Gradient descent, the inner update of MAML (Finn et al. 2017, section 2.2).

    Args:
      learning_rate: the inner step size, in units of the loss that `maml` is given: for a loss that
        is N times larger, the same update needs a rate N times smaller (see `losses.rate_for_mean_loss`).
      steps: inner steps in meta-training, at least 1.
      order: 2 for the exact meta-gradient, 1 for the first-order approximation (FOMAML), which drops
        the derivative of the inner gradients.
      learn_rates: meta-learn inner_params, starting from `learning_rate`, one for every 'parameter' (Meta-SGD),
        'layer', or 'layer_step' (MAML++; steps beyond those of training take the last step's).
      trainable: which parameters are adapted, as a pytree of bools or a function from the parameters
        to one. The others stay as they are in the inner loop, and are still meta-learned
        (ANIL, Raghu et al. 2020, adapts only the head).
      remat: what of the inner steps is kept for the second-order meta-gradient, which is the same:
        'none' keeps everything; 'full' only where each step began, and computes the step again; 'mixflow'
        as little, and takes the derivative of the inner gradient forwards (MixFlow-MG, Kemaev et al.
        2025), with the memory of one step and a copy of the parameters for each. With 'mixflow' nothing is
        differentiated through the aux of the support loss. What `step_weights` of `maml` add is kept in any case.
      start: where a task starts from, given parameters and support set, such as `heads.shared`.
      params_at_step: what the loss is given of the parameters at each inner step, such as `per_step.select_step`.

    Raises:
      ValueError: for a rate that is not positive and finite, fewer than 1 step, another order, and for
        a remat with order 1, which keeps nothing of the inner steps anyway. A mask is checked where it meets
        the parameters.
    """
    validation.positive("learning_rate", learning_rate)
    options: dict[str, Any] = {
        "order": order,
        "trainable": trainable,
        "remat": remat,
        "start": start,
        "params_at_step": params_at_step,
    }
    if not learn_rates:
        return unrolled(optax.sgd(learning_rate), steps=steps, **options)
    validation.one_of("learn_rates", learn_rates, get_args(LearnRates))

    def init_inner_params(adapted: Params) -> InnerParams:
        shape = {"parameter": None, "layer": (), "layer_step": (steps,)}[learn_rates]
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, learning_rate, shape=shape), adapted)

    def scaled_by(inner_params: InnerParams) -> optax.GradientTransformation:
        def update(grads, step, params=None):
            now = inner_params
            if learn_rates == "layer_step":
                now = jax.tree.map(lambda rate: rate[jnp.minimum(step, len(rate) - 1)], inner_params)
            return jax.tree.map(lambda rate, g: -rate * g, now, grads), step + 1

        return optax.GradientTransformation(lambda params: jnp.zeros([], jnp.int32), update)

    return inner_learner(scaled_by, init_inner_params, steps=steps, **options)


def unrolled(optimizer: optax.GradientTransformation, *, steps: int, **options: Any) -> InnerLearner:
    """Any optax optimizer as the inner update, differentiated through.

    Its state starts anew for every task. Adam needs `eps_root > 0` here: at a gradient of zero the
    derivative of its square root is otherwise not a number.

    Args:
      optimizer: an optax transformation, learning rate included; not one that evaluates the loss again by itself,
        as the line search of `optax.lbfgs` does.
      steps, options: as in `sgd`, all but `learn_rates`.

    Raises:
      TypeError: if `optimizer` is not an optax transformation.
      ValueError: for fewer than 1 step, another order, and a remat with order 1.
    """
    validation.transformation("optimizer", optimizer)
    return inner_learner(lambda _: optimizer, lambda _: (), steps=steps, **options)


def inner_learner(
    optimizer: Callable[[InnerParams], optax.GradientTransformation],
    init_inner_params: Callable[[Params], InnerParams],
    *,
    steps: int,
    order: Literal[1, 2] = 2,
    trainable: Mask | None = None,
    remat: Remat = "none",
    start: Start | None = None,
    params_at_step: ParamsAtStep | None = None,
) -> InnerLearner:
    """An `InnerLearner` of an optimizer that is itself meta-learned: the general form of `sgd` and `unrolled`.

    Args:
      optimizer: the optax transformation, given the meta-learned rates.
      init_inner_params: the inner_params before meta-training, given the adapted part of the parameters.
      others: as in `sgd`.
    """
    validation.at_least("steps", steps, 1)
    validation.one_of("order", order, (1, 2))
    validation.one_of("remat", remat, get_args(Remat))
    if order == 1 and remat != "none":
        raise ValueError(
            f"remat={remat!r} is for order 2: with order 1 nothing of the inner steps is kept. Leave it out."
        )
    return InnerLearner(optimizer, init_inner_params, steps, order, trainable, remat, start, params_at_step)


def no_adaptation() -> InnerLearner:
    """No inner step: meta-training is then joint training on all tasks (the paper's 'pretrained' and oracle).

    Evaluated with inner steps it stays as it is; to fine-tune its parameters, evaluate them with another learner.
    """
    return InnerLearner(lambda _: optax.set_to_zero(), lambda _: (), steps=0, order=2)


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
    """Adapts `params` to one task: the inner loop of every algorithm here (paper, algorithms 1 and 3, lines 5-6).

    Args:
      inner: what to do in each step.
      loss_fn: the support loss.
      params: where to start.
      inner_params: learned parameters of the update, from `inner.init_inner_params`.
      batch: the support set of one task, with no task axis.
      steps: number of steps, 0 or more; None takes `inner.steps`.
      probe: called with the parameters before the first step and after each one, for evaluation.
      batch_per_step: every leaf of `batch` has a leading axis `[steps]`, a batch of its own for each step, such
        as the episodes sampled before it in reinforcement learning. `inner.start` is given all of them.

    Returns:
      The adapted parameters, as the loss is given them after the last step, and an `AdaptInfo`.
    """
    steps = inner.steps if steps is None else steps
    if inner.start is not None:
        params = _started(inner.start, params, batch)
    adapted, fixed = partition(params, inner.trainable)
    optimizer = inner.optimizer(inner_params)
    observe = probe or (lambda _: None)

    def effective_params(adapted: Params, fixed: Params, index: Any) -> Params:
        params = combine(adapted, fixed)
        return params if inner.params_at_step is None else inner.params_at_step(params, index)

    def support_loss(adapted: Params, others: Any) -> tuple[jax.Array, Any]:
        fixed, batch, index = others
        return loss_fn(effective_params(adapted, fixed, index), batch)

    value_and_grad = jax.value_and_grad(support_loss, has_aux=True)
    if inner.remat == "mixflow" and inner.order == 2:
        value_and_grad = forward_over_reverse(support_loss)

    def step(carry, scan_inputs):
        index, step_batch = scan_inputs
        adapted, opt_state = carry
        probed = observe(effective_params(adapted, fixed, index))
        (loss, aux), grads = value_and_grad(adapted, (fixed, step_batch if batch_per_step else batch, index))
        at, value = adapted, loss
        if inner.order == 1:
            # The update becomes a constant shift, so that the meta-gradient is the gradient at the
            # adapted parameters. Learned rates still get theirs: the update multiplies by them.
            grads, at, value = lax.stop_gradient((grads, at, loss))
        updates, opt_state = update(optimizer, grads, opt_state, at, value)
        return (optax.apply_updates(adapted, updates), opt_state), (loss, aux, probed)

    start = lax.stop_gradient(adapted) if inner.order == 1 else adapted
    carry = (adapted, optimizer.init(start))
    scan_inputs = (None if inner.params_at_step is None else jnp.arange(steps), batch if batch_per_step else None)
    if steps > 1 and not jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        row = jax.tree.map(lambda leaf: leaf[0], scan_inputs)
        carry = _strongly_typed(carry, jax.eval_shape(step, carry, row)[0])
        step = hoist(step, carry, row)
    if inner.remat == "full":
        step = jax.checkpoint(step, prevent_cse=steps == 1)
    if steps == 1:
        # Without a loop, in which each task's parameters would be its own from the start: under `vmap` the
        # products of all tasks with the parameters they share are one product.
        (adapted, _), row = step(carry, jax.tree.map(lambda leaf: leaf[0], scan_inputs))
        loss, aux, probes = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], row)
    else:  # Rolled up, so that compile time does not grow with the steps.
        (adapted, _), (loss, aux, probes) = lax.scan(step, carry, scan_inputs, length=steps)
    params = effective_params(adapted, fixed, steps)
    probes = _append(probes, observe(params))
    return params, AdaptInfo(loss, aux, probes)


def update(
    optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Params, loss: jax.Array
) -> tuple[Any, Any]:
    """`optimizer.update`, given the loss and the gradient by name too, where it takes them (such as Polyak's)."""
    takes = inspect.signature(optimizer.update).parameters
    everything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    given = {"value": loss, "grad": grads}
    return optimizer.update(
        grads, opt_state, params, **{name: each for name, each in given.items() if everything or name in takes}
    )


def _strongly_typed(carry: Any, after: Any) -> Any:
    """`carry` with the types that it has `after` a step where its own are weak, as a loop makes it."""

    def strong(before: Any, after: Any) -> Any:
        return lax.convert_element_type(before, after.dtype) if jax.typeof(before).weak_type else before

    return jax.tree.map(strong, carry, after)


def _started(start: Start, params: Params, batch: Batch) -> Params:
    """`start(params, batch)`, checked to keep the form of the parameters."""
    started = start(params, batch)
    forms = [jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree) for tree in (started, params)]
    if forms[0] != forms[1]:
        raise ValueError(
            f"start must return parameters of the same structure, shapes and types as it is given, {forms[1]}, but "
            f"returned {forms[0]}."
        )
    return started


def adapt(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    *,
    learning_rate: float | jax.Array,
    steps: int,
) -> tuple[Params, AdaptInfo]:
    """Adapts parameters to one batch by gradient descent: the one-liner for a new task at hand.

    Args:
      loss_fn: `(params, batch) -> (scalar loss, aux)`.
      params: meta-trained parameters, `state.params`.
      batch: the support set of one task, with no task axis.
      learning_rate: step size, in units of `loss_fn`.
      steps: gradient steps, 1 or more.

    Returns:
      The adapted parameters, and an `AdaptInfo` whose `loss` `[steps + 1]` and `aux` are those of
      `batch` before the first and after each step.

    Raises:
      ValueError, TypeError: for a rate or a number of steps that makes no sense, and for a `loss_fn`
        that does not return `(scalar loss, aux)`.
    """
    loss_fn = validation.checked_loss(loss_fn)
    inner = sgd(learning_rate, steps=steps)
    validation.floating_params(params)
    params, info = inner_loop(inner, loss_fn, params, (), batch)
    last = loss_fn(params, batch)
    loss, aux = _append((info.loss, info.aux), last)
    return params, AdaptInfo(loss, aux)


def adapted_part(inner: InnerLearner, params: Params) -> Params:
    """The leaves of `params` that the inner loop adapts, in the same structure with None for the rest."""
    return partition(params, inner.trainable)[0]


def _append(stacked: Any, last: Any) -> Any:
    """Adds one row to the leading axis of every leaf."""
    return jax.tree.map(lambda rows, row: jnp.concatenate([rows, jnp.asarray(row)[None]]), stacked, last)
