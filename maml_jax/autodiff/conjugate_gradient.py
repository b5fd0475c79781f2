"""Conjugate gradients on pytrees, for linear systems whose matrix is given by its product with a vector."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jax import lax


def conjugate_gradient(product: Callable[[Any], Any], target: Any, *, steps: int, square_tolerance: float = 0.0) -> Any:
    """Solves `product(x) = target` from x = 0, for a symmetric positive-definite matrix.

    `jax.scipy.sparse.linalg.cg` evaluates one more product, for the initial residual. At x = 0 this residual is
    `target`.

    Example:
      >>> import jax.numpy as jnp
      >>> matrix = jnp.array([[4.0, 1.0], [1.0, 3.0]])
      >>> x = conjugate_gradient(lambda vector: matrix @ vector, jnp.array([6.0, 7.0]), steps=2)
      >>> print(jnp.round(x, 3))
      [1. 2.]

    Args:
      product: the product of the matrix with a vector, a pytree like `target`.
      target: the right-hand side, any pytree of floating-point arrays.
      steps: the largest number of iterations. Each iteration evaluates one product.
      square_tolerance: the iteration stops once the squared norm of the residual is at most this value.

    Returns:
      `x`, a pytree like `target`. The residual is orthogonal to `x`: the quadratic form `x' product(x)` equals
      `x' target` after any number of steps.

    References:
      Hestenes and Stiefel 1952, "Methods of conjugate gradients for solving linear systems".
    """
    vdot, add_scaled = optax.tree.vdot, optax.tree.add_scale

    def step(carry: Any) -> Any:
        count, x, residual, direction, square = carry
        image = product(direction)
        # The minimum of the quadratic along the direction.
        length = square / vdot(direction, image)
        x, residual = add_scaled(x, length, direction), add_scaled(residual, -length, image)
        # The next direction is conjugate to all earlier ones.
        next_square = vdot(residual, residual)
        return count + 1, x, residual, add_scaled(residual, next_square / square, direction), next_square

    start = (jnp.zeros([], int), optax.tree.zeros_like(target), target, target, vdot(target, target))
    _, x, *_ = lax.while_loop(lambda carry: (carry[0] < steps) & (carry[4] > square_tolerance), step, start)
    return x
