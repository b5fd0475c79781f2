"""Linen layers of the paper's networks, with derivatives that are exact at any order."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maml_jax.convolution import ImplementationName, conv


class Conv(nn.Module):
    """A convolution without bias: the normalisation that follows would take it away again.

    Maps `[B, H, W, C]` to `[B, ceil(H / stride), ceil(W / stride), features]`; use it in place of
    `nn.Conv` in nets that are meta-trained.
    """

    features: int
    size: int = 3
    stride: int = 1
    implementation: ImplementationName | None = None
    kernel_init: Any = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        return conv(x, kernel, stride=self.stride, implementation=self.implementation)


class BatchNorm(nn.Module):
    """Normalisation by the statistics of the batch at hand, with an offset and no scale.

    As in the paper's code: in training and at test alike, so that the examples of a batch see each
    other (transductive). Statistics are over all axes but the last.
    """

    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        offset = self.param("offset", nn.initializers.zeros, (x.shape[-1],))
        axes = tuple(range(x.ndim - 1))
        centred = x - x.mean(axes, keepdims=True)
        variance = jnp.square(centred).mean(axes, keepdims=True)
        return centred * jax.lax.rsqrt(variance + self.epsilon) + offset


def max_pool(x: jax.Array) -> jax.Array:
    """The maximum of each 2x2 window of `[B, H, W, C]`; an odd last row or column is dropped.

    A selection between neighbours, for the sake of its derivative: that of a maximum reduction asks
    which entries equal the result, bit for bit, and a compiler that computes the entries a second
    time with another rounding then finds none.
    """
    rows, columns = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    x = x[:, :rows, :columns]
    return _larger(_larger(x[:, ::2, ::2], x[:, 1::2, ::2]), _larger(x[:, ::2, 1::2], x[:, 1::2, 1::2]))


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(a >= b, a, b)
