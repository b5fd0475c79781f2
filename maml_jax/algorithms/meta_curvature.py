"""Meta-curvature: an inner gradient that is transformed by learned matrices before its step (Park and Oliva 2019)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from maml_jax import validation
from maml_jax.inner import InnerLearner, inner_learner
from maml_jax.types import InnerParams, Params


def meta_curvature(learning_rate: float | jax.Array, *, steps: int, **options: Any) -> InnerLearner:
    """Gradient descent preconditioned by meta-learned matrices (Park and Oliva 2019, section 3).

    A gradient `[height, width, in, out]` of a convolution has a matrix for its outputs, one for its inputs
    and one for its places (height and width together); a dense kernel `[in, out]` has two, a vector one.
    They start as identities, so that what is learned starts as gradient descent.

    Args:
      learning_rate, steps, options: as in `sgd`, all but `learn_rates`.
    """
    validation.positive("learning_rate", learning_rate)

    def init_inner_params(adapted: Params) -> InnerParams:
        return jax.tree.map(lambda leaf: [jnp.eye(size, dtype=leaf.dtype) for size in _sizes(leaf)], adapted)

    def preconditioned(inner_params: InnerParams) -> optax.GradientTransformation:
        def transform(grad: jax.Array, matrices: list[jax.Array]) -> jax.Array:
            out = grad.reshape(_sizes(grad))
            for axis, matrix in enumerate(matrices):
                out = jnp.moveaxis(jnp.tensordot(matrix, out, (1, axis)), 0, axis)
            return -learning_rate * out.reshape(grad.shape)

        return optax.stateless(lambda grads, _: jax.tree.map(transform, grads, inner_params))

    return inner_learner(preconditioned, init_inner_params, steps=steps, **options)


def _sizes(leaf: jax.Array) -> tuple[int, ...]:
    """Sizes of the axes that have a matrix: those of space count as one."""
    if leaf.ndim <= 2:
        return leaf.shape
    *space, inputs, outputs = leaf.shape
    size = 1
    for length in space:
        size *= length
    return size, inputs, outputs
