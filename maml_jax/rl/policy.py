"""Gaussian policies: a neural network for the mean, and a standard deviation that does not depend on the state."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from maml_jax import validation
from maml_jax.nets.layers import Dense
from maml_jax.types import Params

MIN_LOG_STD = float(np.log(1e-6))
"""Lower bound of the logarithm of the standard deviation."""


class Gaussian(NamedTuple):
    """Normal distributions over actions, with independent entries."""

    mean: jax.Array
    """`[..., A]`: the means."""
    log_std: jax.Array
    """Logarithm of the standard deviation; broadcasts against `mean`."""

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Returns the log probability of actions, `[..., A] -> [...]`."""
        scaled = (action - self.mean) * jnp.exp(-self.log_std)
        return (-0.5 * jnp.square(scaled) - self.log_std - 0.5 * np.log(2 * np.pi)).sum(-1)

    def kl_to(self, other: "Gaussian") -> jax.Array:
        """Returns the KL divergence from this distribution to `other`, `[...]`; exactly 0 for equal distributions."""
        difference = other.log_std - self.log_std
        squares = jnp.square(self.mean - other.mean) * jnp.exp(-2 * other.log_std)
        return 0.5 * (squares + jnp.expm1(-2 * difference) + 2 * difference).sum(-1)


class Policy(NamedTuple):
    """A stochastic policy as two pure functions."""

    init: Callable[[jax.Array], Params]
    """`key -> params`."""
    apply: Callable[[Params, jax.Array], Gaussian]
    """`(params, observations [..., O]) -> Gaussian` over actions `[..., A]`."""


class GaussianMLP(nn.Module):
    """A ReLU network for the mean, and a parameter for the logarithm of the standard deviation of each action entry."""

    hidden: Sequence[int]
    actions: int

    @nn.compact
    def __call__(self, x: jax.Array) -> Gaussian:
        for features in self.hidden:
            x = nn.relu(Dense(features, kernel_init=nn.initializers.xavier_uniform())(x))
        mean = Dense(self.actions, kernel_init=nn.initializers.xavier_uniform())(x)
        log_std = self.param("log_std", nn.initializers.zeros, (self.actions,))
        return Gaussian(mean, jnp.maximum(log_std, MIN_LOG_STD))


def gaussian_mlp(observations: int, actions: int, hidden: Sequence[int] = (100, 100)) -> Policy:
    """The policy of the MAML paper (appendix A.2): two hidden ReLU layers, and an initial standard deviation of 1.

    The standard deviation is a parameter that the inner steps adapt.

    Example:
      >>> import jax
      >>> policy = gaussian_mlp(2, 3)
      >>> params = policy.init(jax.random.key(0))
      >>> policy.apply(params, jax.numpy.zeros((5, 2))).mean.shape
      (5, 3)

    Args:
      observations: `O`, entries of an observation.
      actions: `A`, entries of an action.
      hidden: units of the hidden layers.

    Raises:
      ValueError: for a size below 1.

    References:
      Finn, Abbeel and Levine 2017, arXiv:1703.03400, appendix A.2.
    """
    for name, size in (("observations", observations), ("actions", actions), *(("hidden", size) for size in hidden)):
        validation.at_least(name, size, 1)
    net = GaussianMLP(tuple(hidden), actions)
    return Policy(
        init=lambda key: net.init(key, jnp.zeros((1, observations)))["params"],
        apply=lambda params, observation: cast(Gaussian, net.apply({"params": params}, observation)),
    )
