"""Inner adaptation: a few optimizer steps from the meta-parameters on one task's support set.

There is one inner loop, `inner_loop`. First and second order, training and evaluation, one step or
many, gradient descent and any other optax transformation all go through it; an `InnerLearner` only
says which of these is wanted.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from maml_jax import validation
from maml_jax.mixed import mixed_value_and_grad
from maml_jax.trees import divide, join
from maml_jax.types import AdaptInfo, Batch, LossFn, Params, Rates

Mask = Any
"""A pytree of bools shaped like (or a prefix of) the parameters, or a function from parameters to one."""


Checkpoint = Literal["none", "step", "mixed"]
"""What is kept of each inner step for the second-order meta-gradient. 'none': all that it computed. 'step':
where it began, and it is computed again. 'mixed': where it began, and its derivative is taken forwards
over the gradient, not backwards (MixFlow-MG, Kemaev et al. 2025)."""


class InnerLearner(NamedTuple):
    """How one task is learned, as a value. Build it with `sgd`, `unrolled` or `no_adaptation`."""

    optimizer: Callable[[Rates], optax.GradientTransformation]
    """The optimizer of the inner loop, given the meta-learned rates."""
    init_rates: Callable[[Params], Rates]
    """The rates before meta-training, from the adapted part of the parameters; `()` when none is learned."""
    steps: int
    """Inner steps in meta-training; evaluation may take another number."""
    order: Literal[1, 2]
    """2 differentiates through the inner gradients; 1 treats them as constants."""
    trainable: Mask | None = None
    """Which parameters the inner loop adapts; None means all."""
    checkpoint: Checkpoint = "none"
    """What of the inner steps is kept for the meta-gradient."""


def sgd(
    learning_rate: float | jax.Array,
    *,
    steps: int,
    order: Literal[1, 2] = 2,
    learn_rates: bool = False,
    trainable: Mask | None = None,
    checkpoint: Checkpoint = "none",
) -> InnerLearner:
    """Gradient descent, the inner update of MAML (Finn et al. 2017, section 2.2).

    Args:
      learning_rate: the inner step size, in units of the loss that `maml` is given: for a loss that
        is N times larger, the same update needs a rate N times smaller (see `losses.rate_for_mean_loss`).
      steps: inner steps in meta-training, at least 1.
      order: 2 for the exact meta-gradient, 1 for the first-order approximation (FOMAML), which drops
        the derivative of the inner gradients.
      learn_rates: meta-learn one rate for every single parameter, starting from `learning_rate`
        (Meta-SGD, Li et al. 2017).
      trainable: which parameters are adapted, as a pytree of bools or a function from the parameters
        to one. The others stay as they are in the inner loop, and are still meta-learned
        (ANIL, Raghu et al. 2020, adapts only the head).
      checkpoint: what of the inner steps is kept for the second-order meta-gradient, which is the same:
        'none' keeps everything; 'step' only where each step began, and computes the step again; 'mixed'
        as little, and takes the derivative of the inner gradient forwards (MixFlow-MG, Kemaev et al.
        2025), with the memory of one step and a copy of the parameters for each. With 'mixed' nothing is
        differentiated through the aux of the support loss. What `step_weights` of `maml` add is kept in any case.

    Raises:
      ValueError: for a rate that is not positive and finite, fewer than 1 step, another order, and for
        a checkpoint with order 1, which keeps nothing of the inner steps anyway.
    """
    validation.positive("learning_rate", learning_rate)
    if not learn_rates:
        return unrolled(optax.sgd(learning_rate), steps=steps, order=order, trainable=trainable, checkpoint=checkpoint)

    def scaled_by(rates: Rates) -> optax.GradientTransformation:
        return optax.stateless(lambda grads, _: jax.tree.map(lambda rate, g: -rate * g, rates, grads))

    def init_rates(adapted: Params) -> Rates:
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, learning_rate), adapted)

    return _inner_learner(scaled_by, init_rates, steps, order, trainable, checkpoint)


def unrolled(
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    order: Literal[1, 2] = 2,
    trainable: Mask | None = None,
    checkpoint: Checkpoint = "none",
) -> InnerLearner:
    """Any optax optimizer as the inner update, differentiated through.

    Its state starts anew for every task. Adam needs `eps_root > 0` here: at a gradient of zero the
    derivative of its square root is otherwise not a number.

    Args:
      optimizer: an optax transformation, learning rate included.
      steps, order, trainable, checkpoint: as in `sgd`.

    Raises:
      TypeError: if `optimizer` is not an optax transformation.
      ValueError: for fewer than 1 step, another order, and a checkpoint with order 1.
    """
    validation.transformation("optimizer", optimizer)
    return _inner_learner(lambda _: optimizer, lambda _: (), steps, order, trainable, checkpoint)


def _inner_learner(optimizer, init_rates, steps, order, trainable, checkpoint) -> InnerLearner:
    validation.at_least("steps", steps, 1)
    validation.one_of("order", order, (1, 2))
    validation.one_of("checkpoint", checkpoint, get_args(Checkpoint))
    if order == 1 and checkpoint != "none":
        raise ValueError(
            f"checkpoint={checkpoint!r} is for order 2: with order 1 nothing of the inner steps is kept. Leave it out."
        )
    return InnerLearner(optimizer, init_rates, steps, order, trainable, checkpoint)


def no_adaptation() -> InnerLearner:
    """No inner step: meta-training is then joint training on all tasks (the paper's 'pretrained' and oracle).

    Evaluated with inner steps it stays as it is; to fine-tune its parameters, evaluate them with another learner.
    """
    return InnerLearner(lambda _: optax.set_to_zero(), lambda _: (), steps=0, order=2)


def inner_loop(
    inner: InnerLearner,
    loss_fn: LossFn,
    params: Params,
    rates: Rates,
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
      rates: learned parameters of the update, from `inner.init_rates`.
      batch: the support set of one task, with no task axis.
      steps: number of steps, 0 or more; None takes `inner.steps`.
      probe: called with the parameters before the first step and after each one, for evaluation.
      batch_per_step: every leaf of `batch` has a leading axis `[steps]`, a batch of its own for each step, such
        as the episodes sampled before it in reinforcement learning.

    Returns:
      The adapted parameters, in the structure of `params`, and an `AdaptInfo`.
    """
    steps = inner.steps if steps is None else steps
    adapted, fixed = _partition(params, inner.trainable)
    optimizer = inner.optimizer(rates)
    observe = probe or (lambda _: None)

    def support_loss(adapted: Params, others: Any) -> tuple[jax.Array, Any]:
        fixed, batch = others
        return loss_fn(_combine(adapted, fixed), batch)

    value_and_grad = jax.value_and_grad(support_loss, has_aux=True)
    if inner.checkpoint == "mixed" and inner.order == 2:
        value_and_grad = mixed_value_and_grad(support_loss)

    def step(carry, own_batch):
        adapted, opt_state = carry
        probed = observe(_combine(adapted, fixed))
        (loss, aux), grads = value_and_grad(adapted, (fixed, own_batch if batch_per_step else batch))
        seen = adapted
        if inner.order == 1:
            # The update becomes a constant shift, so that the meta-gradient is the gradient at the
            # adapted parameters. Learned rates still get theirs: the update multiplies by them.
            grads, seen = lax.stop_gradient((grads, seen))
        updates, opt_state = optimizer.update(grads, opt_state, seen)
        return (optax.apply_updates(adapted, updates), opt_state), (loss, aux, probed)

    if inner.checkpoint == "step":
        step = jax.checkpoint(step, prevent_cse=steps == 1)
    # Rolled up, so that compile time does not grow with the steps.
    start = lax.stop_gradient(adapted) if inner.order == 1 else adapted
    carry = (adapted, optimizer.init(start))
    batches = batch if batch_per_step else None
    (adapted, _), (loss, aux, probes) = lax.scan(step, carry, batches, length=steps)
    params = _combine(adapted, fixed)
    probes = _append(probes, observe(params))
    return params, AdaptInfo(loss, aux, probes)


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
    return _partition(params, inner.trainable)[0]


def _partition(params: Params, mask: Mask | None) -> tuple[Params, Params]:
    """Splits leaves into adapted and fixed; each half keeps the structure, with None for what it lacks."""
    if mask is None:
        return params, None
    # A module of equinox is a tree and callable at once.
    if callable(mask) and not all(isinstance(leaf, bool) for leaf in jax.tree.leaves(mask)):
        mask = mask(params)
    try:
        mask = jax.tree.broadcast(mask, params)
    except ValueError as error:
        raise ValueError(
            "trainable must be a pytree of bools with the structure of the parameters, or a prefix of it. "
            f"The parameters are {jax.tree.structure(params)}, the mask is {jax.tree.structure(mask)}."
        ) from error
    if not any(jax.tree.leaves(mask)):
        raise ValueError("trainable selects no parameter at all, so the inner loop has nothing to adapt.")
    return divide(params, mask)


def _combine(adapted: Params, fixed: Params) -> Params:
    if fixed is None:
        return adapted
    return join(adapted, fixed)


def _append(stacked: Any, last: Any) -> Any:
    """Adds one row to the leading axis of every leaf."""
    return jax.tree.map(lambda rows, row: jnp.concatenate([rows, jnp.asarray(row)[None]]), stacked, last)
