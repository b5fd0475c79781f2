"""Losses of the inner step: surrogates whose gradient is the policy gradient.

At the parameters that sampled the episodes, the three losses have the same gradient in expectation (for 'dice' up to
the discount to the start of the episode). The second derivatives and therefore the meta-gradients differ:

    'logp'   log pi * A, the loss of the MAML paper. Its Hessian lacks the term E[A grad log pi (grad log pi)'].
    'lvc'    pi / pi_sampled * A. Its Hessian has this term: low-variance curvature (Rothfuss et al. 2019, section 5).
    'dice'   Products of ratios over all earlier time steps. Its Hessian is unbiased (Foerster et al. 2018).

The denominator of a ratio is the policy that sampled the episodes, a constant. At this policy, all derivatives equal
the derivatives of the usual form exp(log pi - stop_gradient(log pi)).
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
"""`(experience, log_prob [E, H]) -> scalar loss`. `log_prob` is 0 where the mask is 0."""


class PolicyAux(NamedTuple):
    """Aux of an inner loss; scalars."""

    kl: jax.Array
    """Mean KL divergence from the policy that sampled the episodes."""
    log_likelihood: jax.Array
    """Sum of the log probabilities of all actions of all episodes."""


def logp(experience: Experience, log_prob: jax.Array) -> jax.Array:
    """Minus the mean of log probability times advantage."""
    return -experience.episodes.mean(log_prob * experience.advantage)


def ratio(experience: Experience, log_prob: jax.Array) -> jax.Array:
    """Minus the mean of likelihood ratio times advantage."""
    return -experience.episodes.mean(jnp.exp(log_prob - experience.log_prob) * experience.advantage)


def clipped_ratio(experience: Experience, log_prob: jax.Array, clip: float) -> jax.Array:
    """Like `ratio`, but ratios outside 1 +- clip do not lower the loss.

    References:
      Schulman et al. 2017, arXiv:1707.06347 (PPO).
    """
    ratios, advantage = jnp.exp(log_prob - experience.log_prob), experience.advantage
    pessimistic = jnp.minimum(ratios * advantage, jnp.clip(ratios, 1 - clip, 1 + clip) * advantage)
    return -experience.episodes.mean(pessimistic)


def dice(experience: Experience, log_prob: jax.Array) -> jax.Array:
    """Minus the DiCE objective with its baseline term, per time step (Foerster et al. 2018, equations 6 and 9)."""
    change = log_prob - experience.log_prob
    rewards = jnp.exp(jnp.cumsum(change, 1)) * experience.reward
    return -experience.episodes.mean(rewards + (1 - jnp.exp(change)) * experience.baseline)


SURROGATES: dict[InnerLossName, Surrogate] = {"logp": logp, "lvc": ratio, "dice": dice}


def inner_loss(policy: Policy, name: InnerLossName) -> LossFn:
    """Returns the loss `(params, Experience) -> (scalar, PolicyAux)` of an inner step.

    Args:
      policy: the policy.
      name: 'logp', 'lvc' or 'dice'; see `maml_jax.rl.losses`.

    Raises:
      ValueError: for any other name.

    References:
      Finn, Abbeel and Levine 2017, arXiv:1703.03400 ('logp'); Rothfuss et al. 2019, arXiv:1810.06784 ('lvc');
      Foerster et al. 2018, arXiv:1802.05098 ('dice').
    """
    validation.one_of("inner_loss", name, get_args(InnerLossName))
    surrogate = SURROGATES[name]

    def loss_fn(params: Params, experience: Experience) -> tuple[jax.Array, PolicyAux]:
        distribution = policy.apply(params, experience.episodes.observation)
        log_prob = experience.log_prob_under(distribution)
        return surrogate(experience, log_prob), PolicyAux(experience.kl_to(distribution), log_prob.sum())

    return loss_fn
