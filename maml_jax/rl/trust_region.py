"""Trust-region policy optimisation (TRPO) of the meta-parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from maml_jax import validation
from maml_jax.autodiff.conjugate_gradient import conjugate_gradient
from maml_jax.rl.objective import Objective
from maml_jax.rl.outer import Outer, OuterInfo
from maml_jax.types import MetaParams

SQUARE_TOLERANCE = 1e-10
"""Conjugate gradients stop when the squared norm of the residual is at most this value."""


def trpo(
    kl_limit: float = 0.01,
    *,
    conjugate_steps: int = 10,
    damping: float = 1e-5,
    backtracking: float = 0.8,
    attempts: int = 15,
    curvature_tasks: int | None = None,
) -> Outer:
    """TRPO: a natural-gradient step to the edge of a trust region, followed by a backtracking line search.

    The defaults are those of Finn et al. If the line search accepts no step, the meta-parameters do not change, and the
    metric `kl` is 0.

    Example:
      >>> from maml_jax.rl.trust_region import trpo
      >>> outer = trpo(kl_limit=0.01)

    Args:
      kl_limit: the largest mean KL divergence, in nats, from the adapted policies before the step to the adapted
        policies after the step.
      conjugate_steps: iterations of conjugate gradients for the direction of the step.
      damping: number to add to the diagonal of the curvature matrix.
      backtracking: factor by which the step shrinks from one attempt to the next.
      attempts: the largest number of step lengths that are tried.
      curvature_tasks: number of tasks whose curvature is computed; None for all tasks. The curvature takes most of the
        time of a meta-step if the environment is fast.

    Raises:
      ValueError: for a number outside its range.

    References:
      Schulman et al. 2015, arXiv:1502.05477; Finn, Abbeel and Levine 2017, arXiv:1703.03400, section 5.3.
    """
    validation.positive("kl_limit", kl_limit)
    validation.positive("damping", damping)
    for name, count in (("conjugate_steps", conjugate_steps), ("attempts", attempts)):
        validation.at_least(name, count, 1)
    if curvature_tasks is not None:
        validation.at_least("curvature_tasks", curvature_tasks, 1)
    if not 0 < backtracking < 1:
        raise ValueError(f"backtracking must be between 0 and 1, but got {backtracking!r}.")

    def update(objective: Objective, meta_params: MetaParams, opt_state: Any) -> tuple[MetaParams, Any, OuterInfo]:
        # The meta-gradient.
        (loss, _), grads = jax.value_and_grad(objective.loss, has_aux=True)(meta_params)
        # The natural gradient, by conjugate gradients with curvature products, on all or the first tasks.
        tasks = jax.tree.map(lambda leaf: leaf[:curvature_tasks], objective.tasks)
        curvature_objective = objective._replace(tasks=tasks)
        product = curvature_product(curvature_objective.distributions, curvature_objective.kl, meta_params)

        def damped(vector: MetaParams) -> MetaParams:
            return jax.tree.map(lambda along, leaf: along + damping * leaf, product(vector), vector)

        direction = conjugate_gradient(damped, grads, steps=conjugate_steps, square_tolerance=SQUARE_TOLERANCE)
        # The step length: the quadratic approximation of the divergence then equals `kl_limit`.
        curvature = optax.tree.vdot(direction, grads)
        step = optax.tree.scale(jnp.sqrt(2 * kl_limit / (curvature + 1e-8)), direction)
        # The line search.
        new, loss_after, kl = line_search(objective, meta_params, step, loss, kl_limit, backtracking, attempts)
        return new, opt_state, OuterInfo(optax.tree.norm(grads), loss - loss_after, kl)

    return Outer(lambda meta_params: (), update)


def curvature_product(
    outputs: Callable[[MetaParams], Any], divergence: Callable[[Any], jax.Array], meta_params: MetaParams
) -> Callable[[MetaParams], MetaParams]:
    """Returns the Hessian-vector product of `divergence(outputs(.))` at parameters where the divergence is minimal.

    At the minimum the gradient of the divergence is zero, so the second derivatives of `outputs` do not matter. The
    Hessian is J'FJ, with the Jacobian J of the outputs and the Hessian F of the divergence with respect to the outputs.
    The function is linearised once, and no third derivative of the policy is computed.
    """
    at, jacobian = jax.linearize(outputs, meta_params)
    transposed = jax.linear_transpose(jacobian, meta_params)
    _, metric = jax.linearize(jax.grad(divergence), at)
    return lambda vector: transposed(metric(jacobian(vector)))[0]


def line_search(
    objective: Objective,
    start: MetaParams,
    step: MetaParams,
    loss: jax.Array,
    kl_limit: float,
    backtracking: float,
    attempts: int,
) -> tuple[MetaParams, jax.Array, jax.Array]:
    """Finds the longest step that lowers the loss and stays in the trust region.

    Tries `start - backtracking^k * step` for k = 0, 1, ... until the loss falls and the divergence is at most
    `kl_limit`.

    Returns:
      The new meta-parameters, their loss and their KL divergence. If no attempt is accepted, for example because a
      value is not finite, these are `start`, `loss` and 0.
    """

    def candidate(attempt: jax.Array) -> MetaParams:
        scale = backtracking**attempt
        return jax.tree.map(lambda at, along: at - scale * along, start, step)

    def attempt(carry: Any) -> Any:
        count, *_ = carry
        new_loss, divergences = objective.loss(candidate(count))
        return count + 1, (new_loss < loss) & (divergences.kl <= kl_limit), new_loss, divergences.kl

    def goes_on(carry: Any) -> jax.Array:
        count, accepted, *_ = carry
        return ~accepted & (count < attempts)

    zero = jnp.zeros_like(loss)
    first = (jnp.zeros([], int), jnp.zeros([], bool), zero, zero)
    count, accepted, new_loss, kl = lax.while_loop(goes_on, attempt, first)
    # If no attempt is accepted, nothing changes.
    moved, unchanged = (candidate(count - 1), new_loss, kl), (start, loss, zero)
    return jax.tree.map(lambda moved, at: jnp.where(accepted, moved, at), moved, unchanged)
