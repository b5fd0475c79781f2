"""Where the last layer of a few-shot classifier starts from, so that the numbering of the classes says nothing.

A learned head has a column for every label, though labels are given to classes at random in each task;
accuracy then varies with the numbering (Ye and Chao 2022). Both ways here are for `start=` of an inner learner.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from maml_jax.inner import Start
from maml_jax.nets.models import HEAD
from maml_jax.types import Batch, Params


def shared(name: str = HEAD) -> Start:
    """All classes start from one vector, the mean of the head's columns (UNICORN-MAML, Ye and Chao 2022).

    Args:
      name: of the head in the parameters, a mapping with `kernel` `[features, N]` and `bias` `[N]`.
    """

    def start(params: Params, support: Batch) -> Params:
        return {**params, name: jax.tree.map(_mean_for_all, _head(params, name))}

    return start


def prototypes(features: Callable[..., jax.Array], name: str = HEAD) -> Start:
    """Each class starts from the mean of its support features, such that the first predictions are those of
    prototypical networks (Proto-MAML, Triantafillou et al. 2020, section 3.1). A class of which there is no
    example starts from zero.

    Args:
      features: `(params, inputs [B, ...]) -> [B, features]`, what goes into the head.
      name: as in `shared`.
    """

    def start(params: Params, support: Batch) -> Params:
        inputs, labels = support
        x = features(params, inputs)
        belongs = jax.nn.one_hot(labels, _head(params, name)["bias"].shape[-1], dtype=x.dtype)
        means = belongs.T @ x / jnp.maximum(belongs.sum(0), 1)[:, None]
        return {**params, name: {"kernel": 2 * means.T, "bias": -jnp.square(means).sum(-1)}}

    return start


def _head(params: Params, name: str) -> Params:
    if not isinstance(params, Mapping) or name not in params:
        known = f"the names {', '.join(map(repr, params))}" if isinstance(params, Mapping) else "none, being no mapping"
        raise ValueError(f"The head is to be at {name!r} in the parameters, but they have {known}. Give name=.")
    return params[name]


def _mean_for_all(leaf: jax.Array) -> jax.Array:
    return jnp.broadcast_to(leaf.mean(-1, keepdims=True), leaf.shape)
