"""Normalisation of activations, with what the statistics are of in its name.

In few-shot learning this decides what a query may know of the other queries, and with it the accuracy
(Bronskill et al. 2020). All kinds are made of the moments of each image.
"""

from typing import Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

Normalisation = Literal["batch", "support", "tasknorm", "instance", "layer", "group", "running"]
"""'batch': statistics of the batch at hand, as in the paper's code; in training and at test alike, so that
the queries of a task see each other (transductive). 'support': of the support set, for queries too.
'tasknorm': of the support set and of the example itself, in a learned mixture (TaskNorm-I, Bronskill et
al. 2020, equation 7). 'instance', 'layer', 'group': of the example itself, over a channel, all channels,
or groups of 16. 'running': what `running.gather` has gathered from other tasks, for queries after training
with 'batch' (MAML++, Antoniou et al. 2019). With all but 'batch', the queries of a task are independent of
each other."""

NORMALISATIONS: tuple[Normalisation, ...] = get_args(Normalisation)

NEEDS_CONTEXT = ("support", "tasknorm")
"""Those that have to see the support set beside the queries."""

GROUP = 16  # Channels, the better of the two choices of Wu and He (2018).


class Moments(NamedTuple):
    """Mean and variance, `[..., C]`."""

    mean: jax.Array
    variance: jax.Array


def of_all(x: jax.Array) -> Moments:
    """Over all axes but the last: `[..., C] -> [C]`."""
    return _moments(x, tuple(range(x.ndim - 1)), keep=False)


def of_each(x: jax.Array) -> Moments:
    """Of each example: `[B, ..., C] -> [B, C]`."""
    return _moments(x, tuple(range(1, x.ndim - 1)), keep=False)


def together(each: Moments, axis: int = 0) -> Moments:
    """Of parts of one size along `axis`, kept as an axis of size 1, the moments of the whole: the law of total
    variance."""
    mean, between = _moments(each.mean, axis, keep=True)
    return Moments(mean, each.variance.mean(axis, keepdims=True) + between)


def mixed(first: Moments, second: Moments, share: jax.Array) -> Moments:
    """Of a mixture in which `share` is of the first and the rest of the second."""
    mean = share * first.mean + (1 - share) * second.mean
    spread = [part.variance + jnp.square(part.mean - mean) for part in (first, second)]
    return Moments(mean, share * spread[0] + (1 - share) * spread[1])


def _moments(x: jax.Array, axes: int | tuple[int, ...], *, keep: bool) -> Moments:
    mean = x.mean(axes, keepdims=True)
    variance = jnp.square(x - mean).mean(axes, keepdims=keep)
    return Moments(mean if keep else mean.reshape(variance.shape), variance)


class Norm(nn.Module):
    """Normalisation of `[B, ..., C]` to mean 0 and variance 1, with an offset and no scale, as the paper's code.

    Called with `support`, the number of examples at the beginning of the batch that are the support set
    (None: all of it), and with `each`, the moments of each example `[B, C]` where these are not those of `x`.
    """

    kind: Normalisation = "batch"
    epsilon: float = 1e-3

    def __call__(self, x: jax.Array, support: int | None = None, each: Moments | None = None) -> jax.Array:
        if each is None:
            each = of_all(x) if self.kind == "batch" else of_each(x)
        mean, scale, offset = self.affine(each, support)
        if mean.ndim > 1:  # [B or 1, C], with an axis for every one of space.
            mean, scale = (leaf.reshape(len(leaf), *[1] * (x.ndim - 2), -1) for leaf in (mean, scale))
        return (x - mean) * scale + offset

    @nn.compact
    def affine(self, moments: Moments, support: int | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Mean, scale and offset, with which `x` becomes `(x - mean) * scale + offset`.

        Args:
          moments: of each example, `[B, C]`; for 'batch' those of all together, `[C]`, will do.
          support: as in a call.

        Returns:
          Mean and scale `[C]`, `[1, C]` or `[B, C]`, and the offset `[C]`.
        """
        offset = self.param("offset", nn.initializers.zeros, moments.mean.shape[-1:])
        mean, variance = self.statistics(moments, support)
        return mean, jax.lax.rsqrt(variance + self.epsilon), offset

    def seen(self, batch: Moments) -> Moments:
        """The same, left for `running.gather` to collect."""
        self.sow("intermediates", "moments", batch)
        return batch

    def statistics(self, each: Moments, support: int | None) -> Moments:
        """What each example is normalised by, `[B, C]` or `[1, C]`, from the moments of each; `[C]` from `[C]`."""
        if self.kind == "batch":
            return self.seen(each if each.mean.ndim == 1 else together(each))
        if self.kind == "running":
            shape = each.mean.shape[-1:]
            mean = self.param("mean", nn.initializers.zeros, shape)
            return Moments(mean[None], self.param("variance", nn.initializers.ones, shape)[None])
        if self.kind == "instance":
            return each
        if self.kind in ("layer", "group"):
            size = min(GROUP, each.mean.shape[-1]) if self.kind == "group" else each.mean.shape[-1]
            groups = Moments(*(leaf.reshape(len(leaf), -1, size) for leaf in each))
            return Moments(*(jnp.repeat(leaf[..., 0], size, -1) for leaf in together(groups, -1)))
        of_support = together(Moments(*(leaf[:support] for leaf in each)))
        if self.kind == "support":
            return of_support
        count = len(each.mean) if support is None else support
        scale, shift = (self.param(name, nn.initializers.zeros, ()) for name in ("share_scale", "share_shift"))
        return mixed(of_support, each, nn.sigmoid(scale * count + shift))
