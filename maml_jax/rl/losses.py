"""Losses of the inner step in reinforcement learning, by name: surrogates whose gradient is the policy gradient.

At the parameters that drew the episodes all three have the same gradient in expectation (up to DiCE's
discount to the start of the episode), but they differ in their second derivatives, and so in the meta-gradient:

    'logp'   log pi * A: the paper's form; its Hessian lacks E[A grad log pi (grad log pi)']
    'lvc'    pi / pi_sampled * A, which has that term: low variance curvature (Rothfuss et al. 2019, section 5)
    'dice'   ratios of the whole past of a step, which make the Hessian unbiased (Foerster et al. 2018)

Ratios are to the policy that drew the episodes, as a constant. At its parameters every derivative is that
of the usual form exp(log pi - stop_gradient(log pi)).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp

from maml_jax import validation
from maml_jax.rl.advantage import Experience
from maml_jax.rl.policy import Policy
from maml_jax.types import LossFn, Params

InnerLossName = Literal["logp", "lvc", "dice"]

Surrogate: TypeAlias = Callable[[Experience, jax.Array], jax.Array]
"""`(experience, log_prob [E, H]) -> scalar` to be minimised; `log_prob` is 0 where the mask is."""


class PolicyAux(NamedTuple):
    """What an inner loss reports beside its value; scalars."""

    kl: jax.Array
    """Mean KL divergence from the policy that drew the episodes."""
    log_likelihood: jax.Array
    """Of all actions of all episodes together."""


def logp(experience: Experience, log_prob: jax.Array) -> jax.Array:
    """Minus the mean of log probability times advantage."""
    return -experience.episodes.mean(log_prob * experience.advantage)


def ratio(experience: Experience, log_prob: jax.Array) -> jax.Array:
    """Minus the mean of likelihood ratio times advantage."""
    return -experience.episodes.mean(jnp.exp(log_prob - experience.log_prob) * experience.advantage)


def clipped_ratio(experience: Experience, log_prob: jax.Array, clip: float) -> jax.Array:
    """As `ratio`, with nothing to gain from ratios outside 1 +- clip (Schulman et al. 2017, equation 7)."""
    ratios, advantage = jnp.exp(log_prob - experience.log_prob), experience.advantage
    least = jnp.minimum(ratios * advantage, jnp.clip(ratios, 1 - clip, 1 + clip) * advantage)
    return -experience.episodes.mean(least)


def dice(experience: Experience, log_prob: jax.Array) -> jax.Array:
    """Minus the DiCE objective with its baseline term (Foerster et al. 2018, equations 6 and 9), per step."""
    change = log_prob - experience.log_prob
    rewards = jnp.exp(jnp.cumsum(change, 1)) * experience.reward
    return -experience.episodes.mean(rewards + (1 - jnp.exp(change)) * experience.baseline)


SURROGATES: dict[InnerLossName, Surrogate] = {"logp": logp, "lvc": ratio, "dice": dice}


def inner_loss(policy: Policy, name: InnerLossName) -> LossFn:
    """The loss `(params, Experience) -> (scalar, PolicyAux)` of an inner step.

    Raises:
      ValueError: for a name that does not exist.
    """
    validation.one_of("inner_loss", name, get_args(InnerLossName))
    surrogate = SURROGATES[name]

    def loss_fn(params: Params, experience: Experience) -> tuple[jax.Array, PolicyAux]:
        distribution = policy.apply(params, experience.episodes.observation)
        log_prob = experience.log_prob_under(distribution)
        return surrogate(experience, log_prob), PolicyAux(experience.kl_to(distribution), log_prob.sum())

    return loss_fn
