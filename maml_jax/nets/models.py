"""The networks of the MAML paper in linen, with the initialisation of the authors' code.

Both networks take `(inputs, context=None)`. `context` `[B', ...]` holds the inputs of the support set. Only the
normalisations in `NEEDS_CONTEXT` use it. With `head=False` the networks return features, the inputs of the last layer.

The paper is Finn, Abbeel and Levine 2017, Model-agnostic meta-learning, arXiv:1703.03400.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from maml_jax.nets.convolution import ImplementationName
from maml_jax.nets.layers import Conv, Dense, PooledConv
from maml_jax.nets.normalisation import MIXES_EXAMPLES, NEEDS_CONTEXT, Norm, Normalisation
from maml_jax.types import Params

HEAD = "head"
"""Name of the last layer in the parameters of both networks."""

small_normal = nn.initializers.truncated_normal(0.01)  # Truncated at two standard deviations, as in TensorFlow.


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
    """Widths of the hidden layers."""
    outputs: int
    """Number of outputs, such as classes."""
    normalisation: Normalisation | None = None
    """Normalisation before each ReLU; None: no normalisation, and biases in the hidden layers."""

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None, *, head: bool = True) -> jax.Array:
        x, support = _with_context(x, context, self.normalisation)
        x = x.reshape(x.shape[0], -1)
        for features in self.hidden:
            # No bias before a normalisation, because the normalisation would subtract the bias.
            x = Dense(features, use_bias=self.normalisation is None, kernel_init=small_normal)(x)
            x = nn.relu(x if self.normalisation is None else Norm(self.normalisation)(x, support))
        x = x[support:]
        return Dense(self.outputs, kernel_init=small_normal, name=HEAD)(x) if head else x


class ConvNet(nn.Module):
    """Four blocks of 3x3 convolution, normalisation and ReLU, `[B, H, W, C] -> logits [B, ways]` (section 5.2).

    With `pooled=False`, for Omniglot, the convolutions have stride 2, and the features are means over space. With
    `pooled=True`, for MiniImagenet, each block ends with 2x2 max-pooling, and the features are flattened (5x5 positions
    from images of 84x84).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net = ConvNet(ways=5, filters=8)
      >>> images = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
      >>> params = jax.eval_shape(net.init, jax.random.key(0), images)["params"]
      >>> sorted(params)[-1], params["head"]["kernel"].shape
      ('head', (8, 5))
    """

    ways: int
    """Number of classes."""
    filters: int = 64
    """Channels of each convolution."""
    pooled: bool = False
    """Whether to use max-pooling in place of stride 2."""
    normalisation: Normalisation = "batch"
    """See `nets.normalisation.Normalisation`."""
    implementation: ImplementationName | None = None
    """Implementation of the convolutions, as for `convolution.conv`."""

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None, *, head: bool = True) -> jax.Array:
        if self.pooled and min(x.shape[1:3]) < 16:
            raise ValueError(
                "With pooled=True the images must have at least 16x16 pixels, one after four max-poolings, but "
                f"have {x.shape[1]}x{x.shape[2]}: give larger images, or pooled=False."
            )
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
    """Puts `context` in front of `x` if the normalisation needs it. Returns the batch, and the size of the context."""
    if context is None or normalisation not in NEEDS_CONTEXT:
        return x, None
    return jnp.concatenate([context, x]), len(context)


def apply_params(net: nn.Module, *, state: Mapping[str, Any] | None = None, **options: Any) -> Callable[..., jax.Array]:
    """Returns the network as a function `(params, inputs, ...) -> outputs`, the form that `maml_jax.losses` takes.

    Example:
      >>> from maml_jax import losses
      >>> loss_fn = losses.cross_entropy(apply_params(ConvNet(ways=5)))

    Args:
      net: any linen module.
      state: the other collections of the module, such as `{"batch_stats": ...}` of `nn.BatchNorm`. Changes of the
        state are dropped. `nn.BatchNorm(use_running_average=False)` therefore normalises by the batch.
      **options: keyword arguments of the network, such as `head=False`.

    Returns:
      The function. Its attribute `mixes_examples` is True for a network of this module whose normalisation takes
      statistics of several examples.

    Raises (when called):
      ValueError: if the network reads a collection that is not in `state`.
    """

    def apply(params: Params, *inputs: jax.Array) -> jax.Array:
        try:
            outputs = net.apply({"params": params, **(state or {})}, *inputs, mutable=list(state or ()), **options)
        except flax.errors.ScopeCollectionNotFound as error:
            raise ValueError(
                "The network has more state than its parameters. Pass the other collections of net.init as state, "
                f"such as state={{'batch_stats': variables['batch_stats']}}. {error}"
            ) from error
        return cast(jax.Array, outputs[0])

    apply.mixes_examples = getattr(net, "normalisation", None) in MIXES_EXAMPLES  # type: ignore[attr-defined]
    return apply


# Masks for the options `trainable` and `per_step`. They select parameters by the names of the layers.


def all_but_norms(params: Params) -> Any:
    """Selects all parameters except those of normalisations. The paper's code adapts these parameters."""
    return _select_layers(params, lambda layer: not layer.startswith("Norm_"))


def head_only(params: Params) -> Any:
    """Selects the last layer (ANIL, Raghu et al. 2020, arXiv:1909.09157)."""
    return _select_layers(params, lambda layer: layer == HEAD)


def body_only(params: Params) -> Any:
    """Selects all parameters except the last layer and normalisations (BOIL, Oh et al. 2021, arXiv:2008.08882)."""
    return _select_layers(params, lambda layer: layer != HEAD and not layer.startswith("Norm_"))


def norms_only(params: Params) -> Any:
    """Selects the parameters of normalisations, for example as `per_step` of `maml_plus_plus`."""
    return _select_layers(params, lambda layer: layer.startswith("Norm_"))


def _select_layers(params: Params, selected: Callable[[str], bool]) -> Any:
    """A pytree of bools with the structure of `params`: `selected(name of the layer)` for each parameter."""
    return jax.tree_util.tree_map_with_path(lambda path, _: selected(path[0].key), params)
