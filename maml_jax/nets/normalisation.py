"""Normalisation of activations, named by the examples that its statistics come from.

In few-shot learning this choice decides whether a prediction depends on the other queries of its task (transductive
evaluation) or not (inductive evaluation). The choice changes the accuracy (Bronskill et al. 2020, arXiv:2003.03284).
"""

from typing import Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

Normalisation = Literal["batch", "support", "tasknorm", "instance", "layer", "group", "running"]
"""The examples that the statistics come from.

- 'batch': the current batch, in training and in evaluation, as in the code of the MAML paper. Only this normalisation
  is transductive.
- 'support': the support set, for support examples and queries.
- 'tasknorm': a learned mixture of the support set and the example itself (TaskNorm-I, arXiv:2003.03284, equation 7).
- 'instance', 'layer', 'group': the example itself, over one channel, all channels, or groups of 16 channels. 'group'
  takes a multiple of 16 channels, or fewer than 16 as one group.
- 'running': other tasks. `running_statistics.gather` computes the statistics after training with 'batch' (MAML++,
  arXiv:1810.09502).
"""

NORMALISATIONS: tuple[Normalisation, ...] = get_args(Normalisation)

NEEDS_CONTEXT = ("support", "tasknorm")
"""Normalisations that need the support set beside the queries."""

MIXES_EXAMPLES = ("batch", *NEEDS_CONTEXT)
"""Normalisations with statistics of several examples."""

GROUP = 16  # Channels per group, as in Wu and He 2018, Group normalization, arXiv:1803.08494.


class Moments(NamedTuple):
    """Mean and variance, `[..., C]`."""

    mean: jax.Array
    variance: jax.Array


def moments_over_batch(x: jax.Array) -> Moments:
    """Moments over all axes but the last: `[B, ..., C] -> [C]`."""
    return _moments(x, tuple(range(x.ndim - 1)), keep=False)


def moments_per_example(x: jax.Array) -> Moments:
    """Moments over all axes but the first and the last: `[B, ..., C] -> [B, C]`."""
    return _moments(x, tuple(range(1, x.ndim - 1)), keep=False)


def pooled_moments(parts: Moments, axis: int = 0) -> Moments:
    """Moments of the union of equally large parts, by the law of total variance.

    Args:
      parts: moments of each part, along `axis`.
      axis: the axis of the parts. It has size 1 in the result.
    """
    mean, between = _moments(parts.mean, axis, keep=True)
    return Moments(mean, parts.variance.mean(axis, keepdims=True) + between)


def interpolate(first: Moments, second: Moments, share: jax.Array) -> Moments:
    """Moments of a mixture, with weight `share` on `first` and `1 - share` on `second`."""
    mean = share * first.mean + (1 - share) * second.mean
    spread = [part.variance + jnp.square(part.mean - mean) for part in (first, second)]
    return Moments(mean, share * spread[0] + (1 - share) * spread[1])


def over_channels(leaf: jax.Array, x: jax.Array) -> jax.Array:
    """Adds leading axes of size 1, up to the rank of `x`. Broadcasting does the same, but JAX may forbid it by
    `jax_numpy_rank_promotion`."""
    return jnp.expand_dims(leaf, range(x.ndim - leaf.ndim))


def _moments(x: jax.Array, axes: int | tuple[int, ...], *, keep: bool) -> Moments:
    mean = x.mean(axes, keepdims=True)
    variance = jnp.square(x - mean).mean(axes, keepdims=keep)
    return Moments(mean if keep else mean.reshape(variance.shape), variance)


class Norm(nn.Module):
    """Normalises `[B, ..., C]` to mean 0 and variance 1, and adds a learned offset. It has no learned scale.

    The code of the MAML paper has an offset and no scale, too.
    Example:
      >>> import jax, jax.numpy as jnp
      >>> norm, x = Norm("batch"), jnp.array([[1.0], [3.0]])
      >>> params = norm.init(jax.random.key(0), x)
      >>> print(jnp.round(norm.apply(params, x), 2))
      [[-1.]
       [ 1.]]

    Call arguments:
      x: activations `[B, ..., C]`.
      support: number of examples at the start of the batch that are the support set; None: all of them.
      moments: moments of each example `[B, C]`, if they differ from the moments of `x`; None: the moments of `x`.
    """

    kind: Normalisation = "batch"
    """The examples that the statistics come from."""
    epsilon: float = 1e-3
    """Added to the variance."""

    def __call__(self, x: jax.Array, support: int | None = None, moments: Moments | None = None) -> jax.Array:
        if moments is None:
            moments = moments_over_batch(x) if self.kind == "batch" else moments_per_example(x)
        mean, scale, offset = self.affine(moments, support)
        if mean.ndim > 1:  # [B or 1, C]: add the spatial axes.
            mean, scale = (leaf.reshape(len(leaf), *[1] * (x.ndim - 2), -1) for leaf in (mean, scale))
        mean, scale, offset = (over_channels(leaf, x) for leaf in (mean, scale, offset))
        return (x - mean) * scale + offset

    @nn.compact
    def affine(self, moments: Moments, support: int | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The normalisation as an affine map, `x -> (x - mean) * scale + offset`.

        Args:
          moments: moments of each example, `[B, C]`. For 'batch' they may be those of the batch, `[C]`.
          support: as for a call of the module.

        Returns:
          Mean and scale `[C]`, `[1, C]` or `[B, C]`, and the offset `[C]`.
        """
        offset = self.param("offset", nn.initializers.zeros, moments.mean.shape[-1:])
        mean, variance = self.statistics(moments, support)
        return mean, jax.lax.rsqrt(variance + self.epsilon), offset

    def statistics(self, moments: Moments, support: int | None) -> Moments:
        """The mean and variance that each example is normalised by, `[B, C]`, `[1, C]` or `[C]`."""
        if self.kind == "batch":
            batch = moments if moments.mean.ndim == 1 else pooled_moments(moments)
            self.sow("intermediates", "moments", batch)  # For `running_statistics.gather`.
            return batch
        channels = moments.mean.shape[-1]
        if self.kind == "running":
            mean = self.param("mean", nn.initializers.zeros, (channels,))
            variance = self.param("variance", nn.initializers.ones, (channels,))
            return Moments(mean[None], variance[None])
        if self.kind == "instance":
            return moments
        if self.kind in ("layer", "group"):
            size = min(GROUP, channels) if self.kind == "group" else channels
            if channels % size:
                raise ValueError(
                    f"Normalisation 'group' takes groups of {GROUP} channels, but {channels} channels are not a "
                    f"multiple of {GROUP}: use such a multiple, at most {GROUP} channels, or 'layer'."
                )
            # Pool the moments of the channels of each group, and repeat the result for each channel.
            groups = Moments(*(leaf.reshape(len(leaf), -1, size) for leaf in moments))
            return Moments(*(jnp.repeat(leaf[..., 0], size, -1) for leaf in pooled_moments(groups, -1)))
        support_moments = pooled_moments(Moments(*(leaf[:support] for leaf in moments)))
        if self.kind == "support":
            return support_moments
        # TaskNorm: the share of the support set is a sigmoid of a learned affine function of its size.
        size = len(moments.mean) if support is None else support
        scale, shift = (self.param(name, nn.initializers.zeros, ()) for name in ("share_scale", "share_shift"))
        return interpolate(support_moments, moments, nn.sigmoid(scale * size + shift))
