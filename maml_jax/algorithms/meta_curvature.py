"""Meta-curvature: gradient descent preconditioned by learned matrices."""

import math
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from maml_jax import validation
from maml_jax.inner import InnerLearner, InnerOptions, inner_learner
from maml_jax.types import InnerParams, Params


def meta_curvature(learning_rate: float | jax.Array, *, steps: int, **options: Unpack[InnerOptions]) -> InnerLearner:
    """An inner learner that multiplies the inner gradient by meta-learned matrices (Park and Oliva 2019, section 3).

    Each axis of a parameter has one square matrix. A convolution kernel `[height, width, in, out]` has three matrices:
    one for all `height * width` positions, one for the input channels, one for the output channels. A dense kernel
    `[in, out]` has two matrices, a vector has one, a scalar has none. Initially the matrices are identities, so
    meta-training starts from gradient descent.

    Example:
      >>> import jax, jax.numpy as jnp, maml_jax, optax
      >>> def loss_fn(params, batch):
      ...     return jnp.mean((batch @ params["kernel"] - 1) ** 2), {}
      >>> learner = maml_jax.maml(loss_fn, maml_jax.meta_curvature(0.1, steps=1), optax.adam(1e-3))
      >>> state = learner.init({"kernel": jnp.zeros((3, 2))})
      >>> [matrix.shape for matrix in state.inner_params["kernel"]]
      [(3, 3), (2, 2)]

    Args:
      learning_rate: step size, for the loss that `maml` is given. The rate is not learned.
      steps: inner steps in training, S.
      **options: see `InnerOptions`.

    Returns:
      An `InnerLearner` for `maml`. `inner_params` holds a list of matrices for each adapted parameter.

    Raises:
      ValueError: as `sgd`.

    References:
      Park and Oliva 2019, Meta-curvature, arXiv:1902.03356.
    """
    validation.positive("learning_rate", learning_rate)

    def init_inner_params(adapted: Params) -> InnerParams:
        return jax.tree.map(lambda leaf: [jnp.eye(size, dtype=leaf.dtype) for size in _matrix_sizes(leaf)], adapted)

    def optimizer(matrices: InnerParams) -> optax.GradientTransformation:
        def update(grad: jax.Array, matrices: list[jax.Array]) -> jax.Array:
            # Multiply every axis of the gradient by its matrix.
            product = grad.reshape(_matrix_sizes(grad))
            for axis, matrix in enumerate(matrices):
                product = jnp.moveaxis(jnp.tensordot(matrix, product, (1, axis)), 0, axis)
            return -learning_rate * product.reshape(grad.shape)

        return optax.stateless(lambda grads, _: jax.tree.map(update, grads, matrices))

    return inner_learner(optimizer, init_inner_params, steps=steps, **options)


def _matrix_sizes(leaf: jax.Array) -> tuple[int, ...]:
    """Sizes of the matrices. The spatial axes of a convolution kernel are merged into one axis."""
    if leaf.ndim <= 2:
        return leaf.shape
    *space, inputs, outputs = leaf.shape
    return math.prod(space), inputs, outputs
