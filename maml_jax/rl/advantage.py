"""From episodes to what the losses are made of: returns, advantages, and what a batch of them amounts to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maml_jax.rl.baseline import linear_baseline
from maml_jax.rl.policy import Gaussian
from maml_jax.rl.rollout import Episodes


class Experience(NamedTuple):
    """Episodes of one task, with what each action was worth; constants for everything that is differentiated."""

    episodes: Episodes
    log_prob: jax.Array
    """`[E, H]`: of the actions, under the policy that drew them; 0 where the mask is."""
    advantage: jax.Array
    """`[E, H]`: mean 0 and deviation 1 over the steps that happened."""
    reward: jax.Array
    """`[E, H]`: discounted to the start of the episode, in units of the advantages' deviation."""
    baseline: jax.Array
    """`[E, H]`: the expected return, discounted and in units as `reward`."""

    def log_prob_under(self, distribution: Gaussian) -> jax.Array:
        """Log probability of each action under another distribution, `[E, H]`; 0 where the mask is."""
        return self.episodes.mask * distribution.log_prob(self.episodes.action)

    def kl_to(self, distribution: Gaussian) -> jax.Array:
        """Mean over the steps of the KL divergence from the policy that drew the actions to another."""
        return self.episodes.mean(self.episodes.sampled.kl_to(distribution))


class Summary(NamedTuple):
    """What is reported of a batch of episodes; scalars."""

    total: jax.Array
    """Mean over the episodes of the sum of rewards, not discounted: the return of the paper's figures."""
    length: jax.Array
    """Mean number of steps of an episode."""
    broken: jax.Array
    """Episodes that were ended because something was not finite."""


def discounted_sums(values: jax.Array, discount: float) -> jax.Array:
    """`[E, H] -> [E, H]`: each value and those after it, `discount` per step."""

    def add(later: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = value + discount * later
        return total, total

    return lax.scan(add, jnp.zeros_like(values[:, 0]), values.T, reverse=True)[1].T


def experience(episodes: Episodes, discount: float, gae_lambda: float) -> Experience:
    """Fits the baseline to these episodes, and values each action by it (Schulman et al. 2016, equation 16).

    What comes after the horizon counts as 0, as in the authors' code.
    """
    mask, reward = episodes.mask, episodes.reward
    value = linear_baseline(episodes.observation, discounted_sums(reward, discount), mask)
    following = jnp.pad(value[:, 1:], ((0, 0), (0, 1)))
    advantage = discounted_sums(mask * (reward + discount * following - value), discount * gae_lambda)
    centred = mask * (advantage - episodes.mean(advantage))
    deviation = jnp.sqrt(episodes.mean(jnp.square(centred))) + 1e-8
    unit = discount ** jnp.arange(reward.shape[1], dtype=reward.dtype) / deviation
    log_prob = mask * episodes.sampled.log_prob(episodes.action)
    return Experience(episodes, log_prob, centred / deviation, unit * reward, unit * value)


def summary(episodes: Episodes) -> Summary:
    """What is reported of these episodes."""
    return Summary(episodes.reward.sum(1).mean(), episodes.mask.sum(1).mean(), episodes.broken.sum())
