"""Initial heads for few-shot classifiers, independent of the numbering of the classes.

A learned head has one column for each label, but each task assigns labels to classes at random. The accuracy of a
classifier therefore varies with the numbering (Ye and Chao 2022). Each function of this module returns a function for
the option `start` of an inner learner.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from maml_jax.inner import Start
from maml_jax.types import Batch, Params


def shared(name: str = "head") -> Start:
    """Initialises the columns of all classes to one vector, the mean of the learned columns (UNICORN-MAML).

    Example:
      >>> import jax.numpy as jnp, maml_jax
      >>> params = {"head": {"kernel": jnp.array([[1.0, 3.0]]), "bias": jnp.array([0.0, 2.0])}}
      >>> start = maml_jax.heads.shared()(params, None)
      >>> start["head"]["kernel"].tolist(), start["head"]["bias"].tolist()
      ([[2.0, 2.0]], [1.0, 1.0])

    Args:
      name: key of the head in the parameters, a mapping with `kernel` `[features, N]` and `bias` `[N]`.

    Returns:
      A function `(params, support) -> params`, for `start=` of `sgd`.

    Raises (when called):
      ValueError: for parameters without a head of that name.

    References:
      Ye and Chao 2022, How to train your MAML to excel in few-shot classification, arXiv:2106.16245.
    """

    def start(params: Params, support: Batch) -> Params:
        mean_of_columns = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf.mean(-1, keepdims=True), leaf.shape), _head(params, name)
        )
        return {**params, name: mean_of_columns}

    return start


def prototypes(features: Callable[..., jax.Array], name: str = "head") -> Start:
    """Initialises the column of each class from its prototype, the mean of its support features (Proto-MAML).

    Before the first inner step the predictions are those of a prototypical network: the logits are the negative
    squared distances to the prototypes, up to a constant. The prototype of a class without support examples is zero.

    Example:
      >>> import jax.numpy as jnp, maml_jax
      >>> params = {"head": {"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(2)}}
      >>> support = (jnp.array([[1.0], [3.0], [5.0]]), jnp.array([0, 0, 1]))  # Prototypes 2 and 5.
      >>> start = maml_jax.heads.prototypes(lambda params, inputs: inputs)(params, support)
      >>> start["head"]["kernel"].tolist(), start["head"]["bias"].tolist()
      ([[4.0, 10.0]], [-4.0, -25.0])

    Args:
      features: `(params, inputs [B, ...]) -> [B, features]`, the inputs of the head.
      name: as for `shared`.

    Returns:
      A function `(params, support) -> params`, for `start=` of `sgd`. The support set is `(inputs [B, ...],
      labels [B])`.

    Raises (when called):
      ValueError: for parameters without a head of that name.

    References:
      Triantafillou et al. 2020, Meta-Dataset, section 3.1, arXiv:1903.03096.
    """

    def start(params: Params, support: Batch) -> Params:
        inputs, labels = support
        x = features(params, inputs)
        ways = _head(params, name)["bias"].shape[-1]
        one_hot = jax.nn.one_hot(labels, ways, dtype=x.dtype)
        prototypes = one_hot.T @ x / jnp.maximum(one_hot.sum(0), 1)[:, None]
        # -|x - p|^2 = 2 x'p - |p|^2 - |x|^2, and the last term is the same for all classes.
        return {**params, name: {"kernel": 2 * prototypes.T, "bias": -jnp.square(prototypes).sum(-1)}}

    return start


def _head(params: Params, name: str) -> Params:
    if not isinstance(params, Mapping):
        raise ValueError(
            f"The parameters must be a mapping with the head at {name!r}, but they are a {type(params).__name__}."
        )
    if name not in params:
        raise ValueError(
            f"The parameters have no head {name!r}, only {', '.join(map(repr, params))}. Pass the name of the last "
            "layer as name."
        )
    return params[name]
