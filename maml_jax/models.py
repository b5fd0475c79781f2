"""The paper's networks in linen, with the initialisation of the authors' code."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax

from maml_jax.convolution import ImplementationName
from maml_jax.layers import BatchNorm, Conv, Dense, PooledConv
from maml_jax.types import Params

small_normal = nn.initializers.truncated_normal(0.01)  # Cut off at two standard deviations, as TensorFlow's.


class MLP(nn.Module):
    """Fully connected ReLU network on flattened inputs, `[B, ...] -> [B, outputs]`.

    The sinusoid net is `MLP((40, 40), 1)` (paper, section 5.1); the Omniglot net without convolutions
    is `MLP((256, 128, 64, 64), ways, normalise=True)` (section 5.2).
    """

    hidden: Sequence[int]
    outputs: int
    normalise: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for features in self.hidden:
            # A bias before the normalisation would be taken away again by it.
            x = Dense(features, use_bias=not self.normalise, kernel_init=small_normal)(x)
            x = nn.relu(BatchNorm()(x) if self.normalise else x)
        return Dense(self.outputs, kernel_init=small_normal)(x)


class ConvNet(nn.Module):
    """Four blocks of 3x3 convolution, batch normalisation and ReLU, `[B, H, W, C] -> logits [B, ways]` (section 5.2).

    Strided, for Omniglot: convolutions of stride 2, then the mean over space. Pooled, for
    MiniImagenet: 2x2 max-pooling after each block, then all that is left (5x5 from 84x84) flattened.
    """

    ways: int
    filters: int = 64
    pooled: bool = False
    implementation: ImplementationName | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for block in range(4):
            name = f"Conv_{block}"
            if self.pooled:
                x, statistics = PooledConv(self.filters, implementation=self.implementation, name=name)(x)
                x = BatchNorm()(x, statistics)
            else:
                x = BatchNorm()(Conv(self.filters, stride=2, implementation=self.implementation, name=name)(x))
            x = nn.relu(x)
        if self.pooled:
            return Dense(self.ways, kernel_init=nn.initializers.xavier_uniform())(x.reshape(x.shape[0], -1))
        return Dense(self.ways, kernel_init=nn.initializers.normal(1.0))(x.mean((1, 2)))


def apply_params(net: nn.Module) -> Callable[[Params, jax.Array], jax.Array]:
    """The net as a function `(params, inputs) -> outputs`, the form in which losses take a model."""
    return lambda params, inputs: cast(jax.Array, net.apply({"params": params}, inputs))


def all_but_offsets(params: Params) -> Any:
    """Mask for `trainable=`: the inner loop adapts all but the normalisation's offsets, as in the paper's code."""
    return jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path[-1:]) != "['offset']", params)
