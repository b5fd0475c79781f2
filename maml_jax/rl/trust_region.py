"""Trust-region policy optimisation of the meta-parameters (Schulman et al. 2015; paper, section 5.3)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from maml_jax import validation
from maml_jax.rl.objective import Objective
from maml_jax.rl.outer import MetaParams, Outer, OuterInfo


def trpo(
    kl_limit: float = 0.01,
    *,
    conjugate_steps: int = 10,
    damping: float = 1e-5,
    backtracking: float = 0.8,
    attempts: int = 15,
    curvature_tasks: int | None = None,
) -> Outer:
    """A natural-gradient step to the edge of a trust region, then back until the loss falls; the paper's numbers.

    Where no step is accepted the meta-parameters stay as they are. Metrics then show a `kl` of 0.

    Args:
      kl_limit: largest mean KL divergence of the adapted policies.
      conjugate_steps: iterations for the direction.
      damping: what is added to the diagonal of the curvature.
      backtracking: factor by which the step shrinks from one attempt to the next.
      attempts: lengths of the step that are tried.
      curvature_tasks: of how many of the tasks the curvature is taken; None: of all. It is most of the
        time of a meta-step where the environment is fast.

    Raises:
      ValueError: for a number out of range, saying which is allowed.
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
        loss, grads = jax.value_and_grad(lambda meta_params: objective.terms(meta_params).loss)(meta_params)
        some = objective._replace(tasks=jax.tree.map(lambda leaf: leaf[:curvature_tasks], objective.tasks))
        product = curvature_product(some.distributions, some.kl, meta_params)

        def damped(vector: MetaParams) -> MetaParams:
            return jax.tree.map(lambda along, leaf: along + damping * leaf, product(vector), vector)

        direction, curvature = conjugate_gradient(damped, grads, conjugate_steps)
        # The length at which the quadratic form of the curvature says that the divergence is at its limit.
        step = optax.tree.scale(jnp.sqrt(2 * kl_limit / (curvature + 1e-8)), direction)
        new, after = line_search(objective, meta_params, step, loss, kl_limit, backtracking, attempts)
        return new, opt_state, OuterInfo(optax.tree.norm(grads), loss - after.loss, after.kl)

    return Outer(lambda meta_params: (), update)


def curvature_product(
    outputs: Callable[[MetaParams], Any], divergence: Callable[[Any], jax.Array], meta_params: MetaParams
) -> Callable[[MetaParams], MetaParams]:
    """The product of a vector with the Hessian of `divergence(outputs(.))`, where the divergence is at its minimum.

    There the slope of the divergence is zero, and with it whatever the second derivatives of `outputs`
    would add: the Hessian is J'FJ, with the Jacobian J of the outputs and the Hessian F of the divergence by
    them. J and its transpose are linearised once, and no third derivative of the policy is ever taken.
    """
    at, jacobian = jax.linearize(outputs, meta_params)
    transposed = jax.linear_transpose(jacobian, meta_params)
    _, metric = jax.linearize(jax.grad(divergence), at)
    return lambda vector: transposed(metric(jacobian(vector)))[0]


def conjugate_gradient(
    product: Callable[[MetaParams], MetaParams], target: MetaParams, steps: int, tolerance: float = 1e-10
) -> tuple[MetaParams, jax.Array]:
    """Solves `product(x) = target` from x = 0, with one product a step and none beside.

    Returns:
      `x` after `steps` steps, or once the square of the residual is below `tolerance`, and the quadratic
      form `x' product(x)`: that is `x' target`, as `x` and the residual are orthogonal.
    """
    vdot, add_scaled = optax.tree.vdot, optax.tree.add_scale

    def step(carry: Any) -> Any:
        count, x, residual, search, square = carry
        image = product(search)
        size = square / vdot(search, image)
        x, residual = add_scaled(x, size, search), add_scaled(residual, -size, image)
        following = vdot(residual, residual)
        return count + 1, x, residual, add_scaled(residual, following / square, search), following

    start = (jnp.zeros([], int), optax.tree.zeros_like(target), target, target, vdot(target, target))
    _, x, *_ = lax.while_loop(lambda carry: (carry[0] < steps) & (carry[4] > tolerance), step, start)
    return x, vdot(x, target)


def line_search(
    objective: Objective,
    start: MetaParams,
    step: MetaParams,
    loss: jax.Array,
    kl_limit: float,
    backtracking: float,
    attempts: int,
) -> tuple[MetaParams, Any]:
    """The longest of `backtracking^k * step` down from `start` whose loss falls with the divergence within its limit.

    Returns:
      The new meta-parameters and their `Terms`; those of `start` if no attempt is accepted, as when
      anything is not finite.
    """

    def candidate(attempt: jax.Array) -> MetaParams:
        scale = backtracking**attempt
        return jax.tree.map(lambda at, along: at - scale * along, start, step)

    def attempt(carry: Any) -> Any:
        count, _, _ = carry
        terms = objective.terms(candidate(count))
        return count + 1, (terms.loss < loss) & (terms.kl <= kl_limit), terms

    shapes = jax.eval_shape(objective.terms, start)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    count, accepted, terms = lax.while_loop(
        lambda carry: ~carry[1] & (carry[0] < attempts), attempt, (jnp.zeros([], int), jnp.zeros([], bool), zeros)
    )
    new = jax.tree.map(lambda moved, at: jnp.where(accepted, moved, at), candidate(count - 1), start)
    stayed = zeros._replace(loss=loss)
    return new, jax.tree.map(lambda moved, at: jnp.where(accepted, moved, at), terms, stayed)
