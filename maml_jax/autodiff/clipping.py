"""Clipping of inner gradients, with a derivative that is finite at a gradient of zero."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from maml_jax import validation


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients down to a global norm of at most `max_norm`, for an inner loop that is differentiated.

    `optax.clip_by_global_norm` gives the same updates. Its derivative divides by the norm, so the meta-gradient is NaN
    if all inner gradients are zero, for example if the inner loop adapts only the layers below a head of zeros. This
    function passes gradients below the limit unchanged, and their derivatives too.

    Example:
      >>> import maml_jax, optax
      >>> clipped = optax.chain(maml_jax.clip_by_global_norm(10.0), optax.sgd(0.1))
      >>> inner = maml_jax.unrolled(clipped, steps=2)

    Args:
      max_norm: the largest global norm, positive.

    Returns:
      A gradient transformation without state. Updates have the shapes and dtypes of the gradients.

    Raises:
      ValueError: if `max_norm` is not positive and finite.
    """
    validation.positive("max_norm", max_norm)

    def update(grads: Any, params: Any = None) -> Any:
        squares = [
            jnp.square(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))) for leaf in jax.tree.leaves(grads)
        ]
        squared_norm = sum(square.sum() for square in squares)
        limit = jnp.square(jnp.asarray(max_norm, jnp.result_type(squared_norm)))
        # The argument of the square root is at least the limit, because its derivative is infinite at zero.
        scale = max_norm / jnp.sqrt(jnp.maximum(squared_norm, limit))
        return jax.tree.map(lambda leaf: (leaf * jnp.where(squared_norm > limit, scale, 1.0)).astype(leaf.dtype), grads)

    return optax.stateless(update)
