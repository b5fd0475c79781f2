"""Linen layers of the paper's networks, with derivatives that are exact at any order."""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maml_jax.nets.convolution import ImplementationName, conv, windows
from maml_jax.nets.normalisation import Moments, Norm, of_each
from maml_jax.parallel import backend

POOL_WINNER = "maml_jax_winner"
"""Name of the places of maxima, for the policies of `jax.checkpoint`."""


class Conv(nn.Module):
    """A convolution without bias: the normalisation that follows would take it away again.

    Maps `[B, H, W, C]` to `[B, ceil(H / stride), ceil(W / stride), features]`; use it in place of
    `nn.Conv` in nets that are meta-trained.

    Called with a `Norm`, and with the number of examples at the beginning that are the support set
    (None: all), it returns the normalised output. By the moments of the batch, and with few channels
    (`backend.normalises_kernel`), it normalises its kernel and not its far larger output, whose moments
    it knows from its input (`output_moments`).
    """

    features: int
    size: int = 3
    stride: int = 1
    implementation: ImplementationName | None = None
    kernel_init: Any = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm | None = None, support: int | None = None) -> jax.Array:
        kernel = self.kernel(x)
        if norm is None:
            return self.convolve(x, kernel)
        if norm.kind == "batch" and backend.normalises_kernel(math.prod(kernel.shape[:3]), self.features):
            mean, scale, offset = norm.affine(output_moments(x, kernel, self.stride))
            kernel, shift = (leaf.astype(kernel.dtype) for leaf in (kernel * scale, offset - mean * scale))
            return self.convolve(x, kernel) + shift
        return self.convolve_and_normalise(x, kernel, norm, support)

    def kernel(self, x: jax.Array) -> jax.Array:
        """The parameter, for such images."""
        return self.param("kernel", self.kernel_init, (self.size, self.size, x.shape[-1], self.features))

    def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """`[B, H, W, C]` and a kernel to what the layer gives without a normalisation."""
        return conv(x, kernel, stride=self.stride, implementation=self.implementation)

    def convolve_and_normalise(self, x: jax.Array, kernel: jax.Array, norm: Norm, support: int | None) -> jax.Array:
        """The same, normalised by the moments of the convolution."""
        return norm(self.convolve(x, kernel), support)


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
    """A convolution, the normalisation, and 2x2 max-pooling, `[B, H, W, C] -> [B, H / 2, W / 2, features]` at stride 1.

    The pooling comes first, which leaves less to normalise: a normalisation grows with its input, so the
    maximum stays where it is. The moments are those before the pooling all the same.
    """

    def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return self._map_images(lambda images: max_pool(Conv.convolve(self, images, kernel)), x)

    def convolve_and_normalise(self, x: jax.Array, kernel: jax.Array, norm: Norm, support: int | None) -> jax.Array:
        def of_images(images: jax.Array) -> tuple[jax.Array, Moments]:
            y = Conv.convolve(self, images, kernel)
            return max_pool(y), of_each(y)

        pooled, each = self._map_images(of_images, x)
        return norm(pooled, support, each)

    def _map_images(self, fn: Callable[[jax.Array], Any], x: jax.Array) -> Any:
        """`fn` of all images, which may be one at a time."""
        if not backend.one_image_at_a_time(x.shape[:3], x.shape[3], self.features):
            return fn(x)
        # The convolution of all images is far larger than what is left of it, so it is made, and for
        # the gradient made again, image by image, and never leaves the caches. Kept is where the maxima
        # are, which is small, and for some normalisations all that the gradient needs.
        kept = jax.checkpoint_policies.save_only_these_names(POOL_WINNER)
        made = jax.lax.map(jax.checkpoint(lambda image: fn(image[None]), prevent_cse=False, policy=kept), x)
        return jax.tree.map(lambda leaf: leaf[:, 0], made)


def output_moments(x: jax.Array, kernel: jax.Array, stride: int = 1) -> Moments:
    """The `Moments` `[D]` of `conv(x, kernel)` over images and space, from `x` and the kernel alone.

    Every output pixel is the product of the kernel with a window of the image, so the mean of the output is
    that of the windows times the kernel, and its variance the quadratic form of their covariance. Neither
    changes with the kernel, and so not from one inner step to the next.

    Args:
      x: images `[B, H, W, C]`.
      kernel: `[h, w, C, D]`.
      stride: of the convolution.
    """
    exact = functools.reduce(jnp.promote_types, (x.dtype, kernel.dtype, jnp.float32))
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)  # A variance is a small difference.
    x, weights = x.astype(exact), kernel.reshape(-1, kernel.shape[3]).astype(exact)
    entries = len(weights)
    # Near the mean of each entry (but for the borders), so that little is lost when it is made the mean.
    centre = jnp.tile(x.mean((0, 1, 2)), entries // x.shape[3])

    def sums(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of the entries of all windows less their centres: the products of each two, and themselves."""
        rows = windows(images, kernel.shape[:2], stride).reshape(-1, entries) - centre
        return product(rows.T, rows), rows.sum(0)

    if backend.one_image_at_a_time(x.shape[:3], x.shape[3], entries):
        zeros = (jnp.zeros((entries, entries), exact), jnp.zeros(entries, exact))
        total, _ = jax.lax.scan(lambda total, image: (jax.tree.map(jnp.add, total, sums(image[None])), None), zeros, x)
    else:
        total = sums(x)
    count = len(x) * math.prod(-(-size // stride) for size in x.shape[1:3])
    products, off_centre = (leaf / count for leaf in total)
    covariance = products - jnp.outer(off_centre, off_centre)
    return Moments(product(centre + off_centre, weights), (weights * product(covariance, weights)).sum(0))


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
    winner = checkpoint_name(winner, POOL_WINNER)
    place = jnp.arange(4, dtype=jnp.int8).reshape(2, 1, 2, 1)
    return jnp.where(winner[:, :, None, :, None] == place, x, 0).sum((2, 4))
