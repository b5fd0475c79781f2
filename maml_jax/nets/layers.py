"""Linen layers of the MAML paper's networks, with exact derivatives of any order."""

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
from maml_jax.nets.normalisation import Moments, Norm, moments_per_example, over_channels
from maml_jax.parallel import backend

POOL_WINNER = "maml_jax_winner"
"""Name of the positions of the maxima in max-pooling, for policies of `jax.checkpoint`."""


class Conv(nn.Module):
    """A convolution without bias, `[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features]`.

    Use this layer in place of `nn.Conv` in meta-trained networks. It has no bias: a normalisation after the layer would
    subtract the bias.

    Call arguments:
      x: images `[B, H, W, C]`.
      norm: a `Norm` that is applied to the output; None: no normalisation.
      support: number of examples at the start of the batch that are the support set; None: all of them.

    For `Norm("batch")` and few input channels (`backend.normalises_kernel`), the layer normalises its kernel, which is
    far smaller than its output. `output_moments` computes the moments of the output from the input.
    """

    features: int
    size: int = 3
    """Rows and columns of the kernel."""
    stride: int = 1
    implementation: ImplementationName | None = None
    """As for `conv`."""
    kernel_init: Any = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm | None = None, support: int | None = None) -> jax.Array:
        kernel = self.kernel(x)
        if norm is None:
            return self.convolve(x, kernel)
        if norm.kind == "batch" and backend.normalises_kernel(math.prod(kernel.shape[:3]), self.features):
            # The normalised output is a convolution with a scaled kernel, plus a shift.
            mean, scale, offset = norm.affine(output_moments(x, kernel, self.stride))
            scaled, shift = kernel * over_channels(scale, kernel), over_channels(offset - mean * scale, x)
            return self.convolve(x, scaled.astype(kernel.dtype)) + shift.astype(kernel.dtype)
        return self.convolve_and_normalise(x, kernel, norm, support)

    def kernel(self, x: jax.Array) -> jax.Array:
        """The kernel parameter `[size, size, C, features]`."""
        return self.param("kernel", self.kernel_init, (self.size, self.size, x.shape[-1], self.features))

    def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The output of the layer without normalisation."""
        return conv(x, kernel, stride=self.stride, implementation=self.implementation)

    def convolve_and_normalise(self, x: jax.Array, kernel: jax.Array, norm: Norm, support: int | None) -> jax.Array:
        """The output of the layer, normalised by the moments of the convolution."""
        return norm(self.convolve(x, kernel), support)


class Dense(nn.Module):
    """A fully connected layer, `[..., C] -> [..., features]`, with the parameters of `nn.Dense`.

    The layer computes `conv` on images of one pixel, because the derivatives of `conv` are fast with one kernel per
    task.
    """

    features: int
    use_bias: bool = True
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        out = conv(x.reshape(-1, 1, 1, x.shape[-1]), kernel[None, None]).reshape(*x.shape[:-1], self.features)
        if not self.use_bias:
            return out
        return out + over_channels(self.param("bias", nn.initializers.zeros, (self.features,)), out)


class PooledConv(Conv):
    """A convolution, normalisation and 2x2 max-pooling, `[B, H, W, C] -> [B, H // 2, W // 2, features]` at stride 1.

    The layer pools before it normalises, so that fewer entries are normalised. The result is the same as in the other
    order: the normalisation is increasing in its input, and uses the moments from before pooling.
    """

    def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return self._map_images(lambda images: max_pool(Conv.convolve(self, images, kernel)), x)

    def convolve_and_normalise(self, x: jax.Array, kernel: jax.Array, norm: Norm, support: int | None) -> jax.Array:
        def pool_with_moments(images: jax.Array) -> tuple[jax.Array, Moments]:
            y = Conv.convolve(self, images, kernel)
            return max_pool(y), moments_per_example(y)

        pooled, moments = self._map_images(pool_with_moments, x)
        return norm(pooled, support, moments)

    def _map_images(self, fn: Callable[[jax.Array], Any], x: jax.Array) -> Any:
        """Applies `fn` to all images together, or to one image at a time."""
        if not backend.maps_over_images(x.shape[:3], x.shape[3], self.features):
            return fn(x)
        # The output of the convolution is far larger than the pooled result. Computed one image at a time, it stays in
        # the caches. The gradient recomputes it in the same way. Only the positions of the maxima are stored. They are
        # small, and for some normalisations the gradient needs nothing else.
        policy = jax.checkpoint_policies.save_only_these_names(POOL_WINNER)
        results = jax.lax.map(jax.checkpoint(lambda image: fn(image[None]), prevent_cse=False, policy=policy), x)
        return jax.tree.map(lambda leaf: leaf[:, 0], results)


def output_moments(x: jax.Array, kernel: jax.Array, stride: int = 1) -> Moments:
    """Computes the moments `[D]` of `conv(x, kernel)` over images and space, without computing the convolution.

    Every output pixel is the product of the kernel with a window of the image. The mean of the output is therefore the
    kernel times the mean of the windows. The variance is a quadratic form in the kernel, with the covariance of the
    windows as its matrix. Mean and covariance of the windows do not depend on the kernel, so they are the same in every
    inner step.

    Args:
      x: images `[B, H, W, C]`.
      kernel: `[h, w, C, D]`.
      stride: stride of the convolution.
    """
    # Compute in float32 or wider, and with full precision: a variance can be a small difference of large numbers.
    wide = functools.reduce(jnp.promote_types, (x.dtype, kernel.dtype, jnp.float32))
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    x, weights = x.astype(wide), kernel.reshape(-1, kernel.shape[3]).astype(wide)
    entries = len(weights)
    # To lose little precision, subtract an approximate mean of each entry. It is exact except at the borders.
    centre = jnp.tile(x.mean((0, 1, 2)), entries // x.shape[3])

    def sums(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Sums over all windows of the products of pairs of centred entries, and of the centred entries."""
        rows = windows(images, kernel.shape[:2], stride).reshape(-1, entries) - centre[None]
        return product(rows.T, rows), rows.sum(0)

    if backend.maps_over_images(x.shape[:3], x.shape[3], entries):
        zeros = (jnp.zeros((entries, entries), wide), jnp.zeros(entries, wide))
        total, _ = jax.lax.scan(lambda total, image: (jax.tree.map(jnp.add, total, sums(image[None])), None), zeros, x)
    else:
        total = sums(x)
    count = len(x) * math.prod(-(-size // stride) for size in x.shape[1:3])
    products, off_centre = (leaf / count for leaf in total)
    covariance = products - jnp.outer(off_centre, off_centre)
    return Moments(product(centre + off_centre, weights), (weights * product(covariance, weights)).sum(0))


def max_pool(x: jax.Array) -> jax.Array:
    """Maximum of each 2x2 window, `[B, H, W, C] -> [B, H // 2, W // 2, C]`; an odd last row or column is dropped.

    Comparisons find the position of each maximum, and are not differentiated. The derivative is the derivative of the
    selection at this position. In contrast, the derivative of a maximum reduction looks for the entry that equals the
    result. If a compiler recomputes the entries with different rounding, no entry is equal.

    Example:
      >>> import jax.numpy as jnp
      >>> max_pool(jnp.arange(4.0).reshape(1, 2, 2, 1)).item()
      3.0
    """
    rows, columns = x.shape[1] // 2, x.shape[2] // 2
    x = x[:, : 2 * rows, : 2 * columns].reshape(len(x), rows, 2, columns, 2, -1)
    a, b, c, d = (jax.lax.stop_gradient(x)[:, :, i, :, j] for i in (0, 1) for j in (0, 1))
    # NaN wins every comparison, as in `jnp.max`.
    upper = (jnp.maximum(a, b) >= jnp.maximum(c, d)) | jnp.isnan(a) | jnp.isnan(b)
    first, third = (a >= b) | jnp.isnan(a), (c >= d) | jnp.isnan(c)
    winner = jnp.where(upper, jnp.where(first, 0, 1), jnp.where(third, 2, 3)).astype(jnp.int8)
    winner = checkpoint_name(winner, POOL_WINNER)
    # Select the maximum with a masked sum over the window. The derivative of the sum is a masked copy.
    place = jnp.arange(4, dtype=jnp.int8).reshape(1, 1, 2, 1, 2, 1)
    return jnp.where(winner[:, :, None, :, None] == place, x, 0).sum((2, 4))
