"""The paper's networks in linen, with the initialisation of the authors' code.

Both take `(inputs, context=None)`: `context` `[B', ...]`, the inputs of the support set, is what a
normalisation by the support set has to see beside the queries; others make nothing of it. With
`head=False` they return features, what goes into the last layer.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from maml_jax.nets.convolution import ImplementationName
from maml_jax.nets.layers import Conv, Dense, PooledConv
from maml_jax.nets.normalisation import NEEDS_CONTEXT, Norm, Normalisation
from maml_jax.types import Params

HEAD = "head"
"""Name of the last layer in the parameters of both nets."""

small_normal = nn.initializers.truncated_normal(0.01)  # Cut off at two standard deviations, as TensorFlow's.


class MLP(nn.Module):
    """Fully connected ReLU network on flattened inputs, `[B, ...] -> [B, outputs]`.

    The sinusoid net is `MLP((40, 40), 1)` (paper, section 5.1); the Omniglot net without convolutions
    is `MLP((256, 128, 64, 64), ways, "batch")` (section 5.2).
    """

    hidden: Sequence[int]
    outputs: int
    normalisation: Normalisation | None = None

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None, *, head: bool = True) -> jax.Array:
        x, support = _beside(context, x, self.normalisation)
        x = x.reshape(x.shape[0], -1)
        for features in self.hidden:
            # A bias before the normalisation would be taken away again by it.
            x = Dense(features, use_bias=self.normalisation is None, kernel_init=small_normal)(x)
            x = nn.relu(x if self.normalisation is None else Norm(self.normalisation)(x, support))
        x = x[support:]
        return Dense(self.outputs, kernel_init=small_normal, name=HEAD)(x) if head else x


class ConvNet(nn.Module):
    """Four blocks of 3x3 convolution, normalisation and ReLU, `[B, H, W, C] -> logits [B, ways]` (section 5.2).

    Strided, for Omniglot: convolutions of stride 2, then the mean over space. Pooled, for
    MiniImagenet: 2x2 max-pooling after each block, then all that is left (5x5 from 84x84) flattened.
    """

    ways: int
    filters: int = 64
    pooled: bool = False
    normalisation: Normalisation = "batch"
    implementation: ImplementationName | None = None

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None, *, head: bool = True) -> jax.Array:
        x, support = _beside(context, x, self.normalisation)
        for block in range(4):
            layer = PooledConv if self.pooled else partial(Conv, stride=2)
            convolution = layer(self.filters, implementation=self.implementation, name=f"Conv_{block}")
            x = nn.relu(convolution(x, Norm(self.normalisation), support))
        x = x[support:].reshape(len(x[support:]), -1) if self.pooled else x[support:].mean((1, 2))
        init = nn.initializers.xavier_uniform() if self.pooled else nn.initializers.normal(1.0)
        return Dense(self.ways, kernel_init=init, name=HEAD)(x) if head else x


def _beside(
    context: jax.Array | None, x: jax.Array, normalisation: Normalisation | None
) -> tuple[jax.Array, int | None]:
    """The inputs with the support set before them, and how many these are, where the normalisation has to see it."""
    if context is None or normalisation not in NEEDS_CONTEXT:
        return x, None
    return jnp.concatenate([context, x]), len(context)


def apply_params(net: nn.Module, **options: Any) -> Callable[..., jax.Array]:
    """The net as a function `(params, inputs, ...) -> outputs`, the form in which losses take a model."""
    return lambda params, *inputs: cast(jax.Array, net.apply({"params": params}, *inputs, **options))


# Masks for `trainable=`: which parameters the inner loop adapts.


def all_but_norms(params: Params) -> Any:
    """All but what belongs to normalisations, as in the paper's code."""
    return _where(params, lambda layer: not layer.startswith("Norm_"))


def head_only(params: Params) -> Any:
    """The last layer alone (ANIL, Raghu et al. 2020)."""
    return _where(params, lambda layer: layer == HEAD)


def body_only(params: Params) -> Any:
    """All but the last layer and normalisations (BOIL, Oh et al. 2021)."""
    return _where(params, lambda layer: layer != HEAD and not layer.startswith("Norm_"))


def norms_only(params: Params) -> Any:
    """What belongs to normalisations; for `per_step=` of `maml_plus_plus`."""
    return _where(params, lambda layer: layer.startswith("Norm_"))


def _where(params: Params, chosen: Callable[[str], bool]) -> Any:
    """Bools shaped like the parameters, from the name of the layer that each belongs to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: chosen(path[0].key), params)
