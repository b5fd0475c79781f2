"""Discounted returns, advantages and metrics of episodes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maml_jax.rl.baseline import features, linear_baseline
from maml_jax.rl.policy import Distribution
from maml_jax.rl.rollout import Episodes


class Experience(NamedTuple):
    """Episodes of one task with their advantages. Losses treat all arrays as constants."""

    episodes: Episodes
    log_prob: jax.Array
    """`[E, H]`: log probability of the actions under the policy that sampled them; 0 where the mask is 0."""
    advantage: jax.Array
    """`[E, H]`: advantages, with mean 0 and standard deviation 1 over the time steps where the mask is 1; else 0."""
    reward: jax.Array
    """`[E, H]`: rewards, discounted to the start of the episode and divided by the deviation of the advantages."""
    baseline: jax.Array
    """`[E, H]`: predicted returns, discounted and divided as `reward`."""

    def log_prob_under(self, distribution: Distribution) -> jax.Array:
        """Returns the log probability of each action under another distribution, `[E, H]`; 0 where the mask is 0."""
        return self.episodes.mask * distribution.log_prob(self.episodes.action)

    def kl_to(self, distribution: Distribution) -> jax.Array:
        """Returns the mean KL divergence from the policy that sampled the actions to `distribution`, a scalar."""
        return self.episodes.mean(self.episodes.distribution.kl_to(distribution))


class Summary(NamedTuple):
    """Metrics of a batch of episodes; scalars."""

    mean_return: jax.Array
    """Mean over the episodes of the undiscounted sum of rewards, the return of the paper's figures."""
    length: jax.Array
    """Mean number of time steps of an episode."""
    num_nonfinite: jax.Array
    """Number of episodes that ended early because a value was not finite."""
    terminated: jax.Array
    """Share of the episodes that ended in a terminal state, before the horizon or at it."""


def discounted_sums(values: jax.Array, discount: float) -> jax.Array:
    """Returns the discounted sum of each value and all later values, `[E, H] -> [E, H]`.

    Example:
      >>> import jax.numpy as jnp
      >>> print(discounted_sums(jnp.array([[1.0, 1.0, 1.0]]), 0.5))
      [[1.75 1.5  1.  ]]

    Args:
      values: `[E, H]`.
      discount: the discount per time step.
    """

    def add(later: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = value + discount * later
        return total, total

    return lax.scan(add, jnp.zeros_like(values[:, 0]), values.T, reverse=True)[1].T


def experience(episodes: Episodes, discount: float, gae_lambda: float, bootstrap: bool = False) -> Experience:
    """Estimates advantages of episodes by generalised advantage estimation.

    The baseline is fitted to the same episodes. The value after a terminal state is 0.

    Args:
      episodes: episodes of one task.
      discount: discount of rewards per time step, 0 to 1.
      gae_lambda: the parameter lambda of the estimator, 0 to 1. With 1, advantages are returns minus the baseline.
      bootstrap: whether the value after an episode that the horizon or the environment truncated is the prediction of
        the baseline. False: 0, as in the code of Finn et al.

    Returns:
      The episodes with normalised advantages.

    References:
      Schulman et al. 2016, arXiv:1506.02438, equation 16.
    """
    mask, reward = episodes.mask, episodes.reward
    # Fit the baseline.
    value, weights = linear_baseline(episodes.observation, discounted_sums(reward, discount), mask)
    next_value = jnp.pad(value[:, 1:], ((0, 0), (0, 1)))
    if bootstrap:
        after = (features(episodes.last_observation[:, None], mask.sum(1, keepdims=True)) @ weights)[:, 0]
        after = after * (1 - episodes.terminated) * (1 - episodes.nonfinite)
        is_last = mask - jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
        next_value = next_value + is_last * after[:, None]
    # Sum the temporal differences, and normalise the sums over all time steps of the task.
    advantage = discounted_sums(mask * (reward + discount * next_value - value), discount * gae_lambda)
    centred = mask * (advantage - episodes.mean(advantage))
    deviation = jnp.sqrt(episodes.mean(jnp.square(centred))) + 1e-8
    # Scale rewards and values to the advantages, and discount them to the start of the episode.
    unit = discount ** jnp.arange(reward.shape[1], dtype=reward.dtype) / deviation
    log_prob = mask * episodes.distribution.log_prob(episodes.action)
    return Experience(episodes, log_prob, centred / deviation, unit * reward, unit * value)


def summary(episodes: Episodes) -> Summary:
    """Computes the metrics of a batch of episodes."""
    return Summary(
        episodes.reward.sum(1).mean(),
        episodes.mask.sum(1).mean(),
        episodes.nonfinite.sum(),
        episodes.terminated.mean(),
    )
