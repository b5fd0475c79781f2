"""The networks of the MAML paper in linen, with the initialisation of the authors' code.

Both networks take `(inputs, context=None)`. `context` `[B', ...]` is the inputs of the support set, for a
normalisation that needs them beside the queries (`NEEDS_CONTEXT`); the others ignore them. With `head=False` the
networks return features, the inputs of the last layer.
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
"""Name of the last layer in the parameters of both networks."""

small_normal = nn.initializers.truncated_normal(0.01)  # Truncated at two standard deviations, as TensorFlow's.


class MLP(nn.Module):
    """Fully connected ReLU network on flattened inputs, `[B, ...] -> [B, outputs]`.

    The sinusoid network is `MLP((40, 40), 1)` (paper, section 5.1); the Omniglot network without convolutions
    is `MLP((256, 128, 64, 64), ways, "batch")` (section 5.2).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net = MLP((40, 40), 1)
      >>> params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 1)))["params"]
      >>> net.apply({"params": params}, jnp.zeros((5, 1))).shape
      (5, 1)
    """

    hidden: Sequence[int]
    outputs: int
    normalisation: Normalisation | None = None

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None, *, head: bool = True) -> jax.Array:
        x, support = _with_context(x, context, self.normalisation)
        x = x.reshape(x.shape[0], -1)
        for features in self.hidden:
            # No bias before a normalisation, which would subtract it.
            x = Dense(features, use_bias=self.normalisation is None, kernel_init=small_normal)(x)
            x = nn.relu(x if self.normalisation is None else Norm(self.normalisation)(x, support))
        x = x[support:]
        return Dense(self.outputs, kernel_init=small_normal, name=HEAD)(x) if head else x


class ConvNet(nn.Module):
    """Four blocks of 3x3 convolution, normalisation and ReLU, `[B, H, W, C] -> logits [B, ways]` (section 5.2).

    For Omniglot: convolutions of stride 2, then the mean over space. With `pooled`, for MiniImagenet: 2x2 max-pooling
    after each block, then the flattened features (5x5 from images of 84x84).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net = ConvNet(ways=5, filters=8)
      >>> images = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
      >>> params = jax.eval_shape(net.init, jax.random.key(0), images)["params"]
      >>> sorted(params)[-1], params["head"]["kernel"].shape
      ('head', (8, 5))
    """

    ways: int
    filters: int = 64
    pooled: bool = False
    normalisation: Normalisation = "batch"
    implementation: ImplementationName | None = None

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None, *, head: bool = True) -> jax.Array:
        x, support = _with_context(x, context, self.normalisation)
        for block in range(4):
            layer = PooledConv if self.pooled else partial(Conv, stride=2)
            convolution = layer(self.filters, implementation=self.implementation, name=f"Conv_{block}")
            x = nn.relu(convolution(x, Norm(self.normalisation), support))
        x = x[support:].reshape(len(x[support:]), -1) if self.pooled else x[support:].mean((1, 2))
        init = nn.initializers.xavier_uniform() if self.pooled else nn.initializers.normal(1.0)
        return Dense(self.ways, kernel_init=init, name=HEAD)(x) if head else x


def _with_context(
    x: jax.Array, context: jax.Array | None, normalisation: Normalisation | None
) -> tuple[jax.Array, int | None]:
    """The support set followed by the inputs, and its size, if the normalisation needs it; else the inputs and None."""
    if context is None or normalisation not in NEEDS_CONTEXT:
        return x, None
    return jnp.concatenate([context, x]), len(context)


def apply_params(net: nn.Module, **options: Any) -> Callable[..., jax.Array]:
    """The network as a function `(params, inputs, ...) -> outputs`, as `losses` take a model.

    Args:
      net: any linen module.
      options: keyword arguments of its call, such as `head=False`.
    """
    return lambda params, *inputs: cast(jax.Array, net.apply({"params": params}, *inputs, **options))


# Masks of parameters, for `trainable=` and `per_step=`. They go by the names of the layers.


def all_but_norms(params: Params) -> Any:
    """Selects everything but the parameters of normalisations, as the paper's code adapts."""
    return _select_layers(params, lambda layer: not layer.startswith("Norm_"))


def head_only(params: Params) -> Any:
    """Selects the last layer (ANIL, Raghu et al. 2020, arXiv:1909.09157)."""
    return _select_layers(params, lambda layer: layer == HEAD)


def body_only(params: Params) -> Any:
    """Selects everything but the last layer and normalisations (BOIL, Oh et al. 2021, arXiv:2008.08882)."""
    return _select_layers(params, lambda layer: layer != HEAD and not layer.startswith("Norm_"))


def norms_only(params: Params) -> Any:
    """Selects the parameters of normalisations, such as for `per_step=` of `maml_plus_plus`."""
    return _select_layers(params, lambda layer: layer.startswith("Norm_"))


def _select_layers(params: Params, selected: Callable[[str], bool]) -> Any:
    """A pytree of bools shaped like the parameters, by the name of the layer of each parameter."""
    return jax.tree_util.tree_map_with_path(lambda path, _: selected(path[0].key), params)
