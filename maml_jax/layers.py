"""Linen layers of the paper's networks, with derivatives that are exact at any order."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maml_jax import backend
from maml_jax.convolution import ImplementationName, conv
from maml_jax.normalisation import Moments, of_each


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
        return conv(x, self.kernel(x), stride=self.stride, implementation=self.implementation)

    def kernel(self, x: jax.Array) -> jax.Array:
        """The parameter, for such images."""
        return self.param("kernel", self.kernel_init, (self.size, self.size, x.shape[-1], self.features))


class Dense(nn.Module):
    """A fully connected layer, `[..., C] -> [..., features]`, with the parameters of `nn.Dense`.

    It is a convolution of images of one pixel: a product of matrices whose derivatives, with a kernel
    for every task, have the same fast forms.
    """

    features: int
    use_bias: bool = True
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        out = conv(x.reshape(-1, 1, 1, x.shape[-1]), kernel[None, None]).reshape(*x.shape[:-1], self.features)
        return out + self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else out


class PooledConv(Conv):
    """A convolution and 2x2 max-pooling, `[B, H, W, C] -> [B, H / 2, W / 2, features]` at stride 1.

    Returns the pooled images, and the `Moments` `[B, features]` of each image before pooling: a
    normalisation that comes before the pooling can then be applied after it. It grows with its input,
    so the maximum stays where it is.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, Moments]:  # type: ignore[override]
        kernel = self.kernel(x)

        def of_images(x: jax.Array) -> tuple[jax.Array, Moments]:
            y = conv(x, kernel, stride=self.stride, implementation=self.implementation)
            return max_pool(y), of_each(y)

        if not backend.one_image_at_a_time(x.shape[:3], self.features):
            return of_images(x)
        # The convolution of all images is far larger than what is left of it, so it is made, and for
        # the gradient made again, image by image, and never leaves the caches.
        made = jax.lax.map(jax.checkpoint(lambda image: of_images(image[None]), prevent_cse=False), x)
        return jax.tree.map(lambda leaf: leaf[:, 0], made)


def max_pool(x: jax.Array) -> jax.Array:
    """The maximum of each 2x2 window of `[B, H, W, C]`; an odd last row or column is dropped.

    Each window's winner is chosen once, by comparisons that nothing is differentiated through, and what
    is differentiated is the choice. The derivative of a maximum reduction asks which entries equal the
    result, bit for bit, and a compiler that computes the entries a second time with another rounding
    then finds none. A sum over the window of what was chosen, and not the choice alone, makes the
    derivative one pass of the same form.
    """
    rows, columns = x.shape[1] // 2, x.shape[2] // 2
    x = x[:, : 2 * rows, : 2 * columns].reshape(len(x), rows, 2, columns, 2, -1)
    a, b, c, d = (jax.lax.stop_gradient(x)[:, :, i, :, j] for i in (0, 1) for j in (0, 1))
    # What is not a number wins, so that it shows.
    upper = (jnp.maximum(a, b) >= jnp.maximum(c, d)) | jnp.isnan(a) | jnp.isnan(b)
    first, third = (a >= b) | jnp.isnan(a), (c >= d) | jnp.isnan(c)
    winner = jnp.where(upper, jnp.where(first, 0, 1), jnp.where(third, 2, 3)).astype(jnp.int8)
    place = jnp.arange(4, dtype=jnp.int8).reshape(2, 1, 2, 1)
    return jnp.where(winner[:, :, None, :, None] == place, x, 0).sum((2, 4))
