"""Policies: neural networks that give a Gaussian or a categorical distribution over actions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from maml_jax import validation
from maml_jax.nets.layers import Dense
from maml_jax.types import Params

MIN_LOG_STD = float(np.log(1e-6))
"""Lower bound of the logarithm of the standard deviation."""


class Distribution(Protocol):
    """Distributions over actions `[..., A]`: a pytree of arrays whose last axis is `A`, such as `Gaussian`."""

    @staticmethod
    def noise(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Returns random numbers `[..., A]` for `sample`."""

    def sample(self, noise: jax.Array) -> jax.Array:
        """Returns actions `[..., A]` that are a function of the distribution and of `noise`."""

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Returns the log probability of actions, `[..., A] -> [...]`."""

    def kl_to(self, other: Any) -> jax.Array:
        """Returns the KL divergence from this distribution to `other`, `[...]`; exactly 0 for equal distributions."""


class Gaussian(NamedTuple):
    """Normal distributions over actions, with independent entries."""

    mean: jax.Array
    """`[..., A]`: the means."""
    log_std: jax.Array
    """Logarithm of the standard deviation; broadcasts against `mean`."""

    @staticmethod
    def noise(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Returns standard normal numbers for `sample`."""
        return jax.random.normal(key, shape, dtype)

    def sample(self, noise: jax.Array) -> jax.Array:
        """Returns actions `[..., A]`."""
        return self.mean + jnp.exp(self.log_std) * noise

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Returns the log probability of actions, `[..., A] -> [...]`."""
        scaled = (action - self.mean) * jnp.exp(-self.log_std)
        return (-0.5 * jnp.square(scaled) - self.log_std - 0.5 * np.log(2 * np.pi)).sum(-1)

    def kl_to(self, other: "Gaussian") -> jax.Array:
        """Returns the KL divergence from this distribution to `other`, `[...]`; exactly 0 for equal distributions."""
        difference = other.log_std - self.log_std
        squares = jnp.square(self.mean - other.mean) * jnp.exp(-2 * other.log_std)
        return 0.5 * (squares + jnp.expm1(-2 * difference) + 2 * difference).sum(-1)


class Categorical(NamedTuple):
    """Distributions over `A` discrete actions. An action is a one-hot vector `[A]`."""

    logits: jax.Array
    """`[..., A]`: finite logarithms of probabilities, up to a constant."""

    @staticmethod
    def noise(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Returns Gumbel numbers for `sample`."""
        return jax.random.gumbel(key, shape, dtype)

    def sample(self, noise: jax.Array) -> jax.Array:
        """Returns one-hot actions `[..., A]`; NaN where a logit is not finite."""
        action = jax.nn.one_hot(jnp.argmax(self.logits + noise, -1), self.logits.shape[-1], dtype=self.logits.dtype)
        return jnp.where(jnp.isfinite(self.logits).all(-1, keepdims=True), action, jnp.nan)

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Returns the log probability of one-hot actions, `[..., A] -> [...]`."""
        return (action * jax.nn.log_softmax(self.logits)).sum(-1)

    def kl_to(self, other: "Categorical") -> jax.Array:
        """Returns the KL divergence from this distribution to `other`, `[...]`; exactly 0 for equal distributions."""
        log_prob = jax.nn.log_softmax(self.logits)
        difference = log_prob - jax.nn.log_softmax(other.logits)
        # The sum of p (exp(-difference) - 1) is 0. With it no term is negative, and small divergences are exact.
        return (jnp.exp(log_prob) * (jnp.expm1(-difference) + difference)).sum(-1)


class Policy(NamedTuple):
    """A stochastic policy as two pure functions."""

    init: Callable[[jax.Array], Params]
    """`key -> params`."""
    apply: Callable[[Params, jax.Array], Distribution]
    """`(params, observations [..., O]) -> Gaussian` or `Categorical` over actions `[..., A]`."""


class GaussianMLP(nn.Module):
    """A ReLU network for the mean, and a parameter for the logarithm of the standard deviation of each action entry."""

    hidden: Sequence[int]
    actions: int

    @nn.compact
    def __call__(self, x: jax.Array) -> Gaussian:
        mean = _layers(x, self.hidden, self.actions)
        log_std = self.param("log_std", nn.initializers.zeros, (self.actions,))
        return Gaussian(mean, jnp.maximum(log_std, MIN_LOG_STD))


class CategoricalMLP(nn.Module):
    """A ReLU network for the logits of the actions."""

    hidden: Sequence[int]
    actions: int

    @nn.compact
    def __call__(self, x: jax.Array) -> Categorical:
        return Categorical(_layers(x, self.hidden, self.actions))


def _layers(x: jax.Array, hidden: Sequence[int], outputs: int) -> jax.Array:
    """Hidden ReLU layers and a linear layer. Called in a compact method."""
    for features in hidden:
        x = nn.relu(Dense(features, kernel_init=nn.initializers.xavier_uniform())(x))
    return Dense(outputs, kernel_init=nn.initializers.xavier_uniform())(x)


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
    return _policy(GaussianMLP, observations, actions, hidden)


def categorical_mlp(observations: int, actions: int, hidden: Sequence[int] = (100, 100)) -> Policy:
    """A policy for discrete actions: the network of `gaussian_mlp` gives the logits of the actions.

    Example:
      >>> import jax
      >>> policy = categorical_mlp(4, 2)
      >>> params = policy.init(jax.random.key(0))
      >>> policy.apply(params, jax.numpy.zeros((5, 4))).logits.shape
      (5, 2)

    Args:
      observations: `O`, entries of an observation.
      actions: `A`, the number of actions, which are one-hot vectors `[A]`.
      hidden: units of the hidden layers.

    Raises:
      ValueError: for a size below 1.

    References:
      Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement learning".
    """
    return _policy(CategoricalMLP, observations, actions, hidden)


Net: TypeAlias = type[GaussianMLP] | type[CategoricalMLP]


def _policy(net_type: Net, observations: int, actions: int, hidden: Sequence[int]) -> Policy:
    for name, size in (("observations", observations), ("actions", actions), *(("hidden", size) for size in hidden)):
        validation.at_least(name, size, 1)
    net = net_type(tuple(hidden), actions)
    return Policy(
        init=lambda key: net.init(key, jnp.zeros((1, observations)))["params"],
        apply=lambda params, observation: cast(Distribution, net.apply({"params": params}, observation)),
    )
