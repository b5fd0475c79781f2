"""Gaussian policies: a mean from a network, and a standard deviation that is the same everywhere."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from maml_jax import validation
from maml_jax.nets.layers import Dense
from maml_jax.types import Params

LEAST_LOG_STD = float(np.log(1e-6))


class Gaussian(NamedTuple):
    """Independent normal distributions over actions."""

    mean: jax.Array
    """`[..., A]`."""
    log_std: jax.Array
    """Broadcasts against `mean`."""

    def log_prob(self, action: jax.Array) -> jax.Array:
        """`[..., A] -> [...]`."""
        scaled = (action - self.mean) * jnp.exp(-self.log_std)
        return (-0.5 * jnp.square(scaled) - self.log_std - 0.5 * np.log(2 * np.pi)).sum(-1)

    def kl_to(self, other: "Gaussian") -> jax.Array:
        """Kullback-Leibler divergence from this distribution to another, `[...]`; 0 where they are equal."""
        difference = other.log_std - self.log_std
        squares = jnp.square(self.mean - other.mean) * jnp.exp(-2 * other.log_std)
        return 0.5 * (squares + jnp.expm1(-2 * difference) + 2 * difference).sum(-1)


class Policy(NamedTuple):
    """A stochastic policy as pure functions."""

    init: Callable[[jax.Array], Params]
    """`key -> params`."""
    apply: Callable[[Params, jax.Array], Gaussian]
    """`(params, observations [..., O]) -> Gaussian` over actions."""


class GaussianMLP(nn.Module):
    """A ReLU network for the mean, and one parameter per action for the logarithm of the deviation."""

    hidden: Sequence[int]
    actions: int

    @nn.compact
    def __call__(self, x: jax.Array) -> Gaussian:
        for features in self.hidden:
            x = nn.relu(Dense(features, kernel_init=nn.initializers.xavier_uniform())(x))
        mean = Dense(self.actions, kernel_init=nn.initializers.xavier_uniform())(x)
        log_std = self.param("log_std", nn.initializers.zeros, (self.actions,))
        return Gaussian(mean, jnp.maximum(log_std, LEAST_LOG_STD))


def gaussian_mlp(observations: int, actions: int, hidden: Sequence[int] = (100, 100)) -> Policy:
    """The paper's policy (appendix A.2): two hidden layers of 100, a deviation that starts at 1 and is adapted too.

    Args:
      observations: numbers in an observation, `O`.
      actions: numbers in an action, `A`.
      hidden: units of the hidden layers.

    Raises:
      ValueError: for a size below 1.
    """
    for name, size in (("observations", observations), ("actions", actions), *(("hidden", size) for size in hidden)):
        validation.at_least(name, size, 1)
    net = GaussianMLP(tuple(hidden), actions)
    return Policy(
        init=lambda key: net.init(key, jnp.zeros((1, observations)))["params"],
        apply=lambda params, observation: cast(Gaussian, net.apply({"params": params}, observation)),
    )
