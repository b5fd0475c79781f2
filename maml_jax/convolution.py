"""One convolution, `conv`, with a choice of implementations behind it.

In meta-learning every task has kernels of its own, so that `vmap` over tasks turns a library
convolution into a grouped one. XLA's CPU backend runs those, and above all their gradients, much slower
than the arithmetic needs. There the same sum is written as a matrix product of
image patches and kernel, which batches over tasks and differentiates, at any order, into matrix
products again. GPUs and TPUs have grouped convolutions of their own.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

Implementation = Literal["patches", "lax"]


def conv(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, implementation: Implementation | None = None
) -> jax.Array:
    """Two-dimensional convolution with 'SAME' padding (and no bias), differentiable at any order.

    Args:
      x: images `[B, H, W, C]`.
      kernel: `[h, w, C, D]`.
      stride: in both directions. 'SAME' pads as TensorFlow and XLA do: the output has
        `ceil(H / stride)` rows, and an odd padding is larger at the end.
      implementation: None takes the one that suits the backend.

    Returns:
      `[B, ceil(H / stride), ceil(W / stride), D]`.
    """
    implementation = implementation or default_implementation()
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, but got {implementation!r}.")
    return IMPLEMENTATIONS[implementation](x, kernel, stride)


def default_implementation() -> Implementation:
    """The one place where the backend decides."""
    return "patches" if jax.default_backend() == "cpu" else "lax"


def _lax(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _patches(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    height, width, channels, features = kernel.shape
    rows, columns = -(-x.shape[1] // stride), -(-x.shape[2] // stride)
    pads = lax.padtype_to_pads(x.shape[1:3], (height, width), (stride, stride), "SAME")
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    patches = [
        lax.slice(
            x,
            (0, i, j, 0),
            (x.shape[0], i + (rows - 1) * stride + 1, j + (columns - 1) * stride + 1, channels),
            (1, stride, stride, 1),
        )
        for i in range(height)
        for j in range(width)
    ]
    return jnp.concatenate(patches, -1) @ kernel.reshape(height * width * channels, features)


IMPLEMENTATIONS: dict[str, Callable[[jax.Array, jax.Array, int], jax.Array]] = {"patches": _patches, "lax": _lax}
