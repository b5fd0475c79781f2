"""Episodes of a policy in an environment, all of one length, with a mask over the steps that happened."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maml_jax.rl.environment import Environment, Step
from maml_jax.rl.policy import Gaussian, Policy
from maml_jax.types import Params


class Episodes(NamedTuple):
    """Episodes of one task. What the mask leaves out is finite and means nothing."""

    observation: jax.Array
    """`[E, H, O]`: before each action."""
    action: jax.Array
    """`[E, H, A]`: as the policy drew it; the environment got it cut off to [-1, 1]."""
    sampled: Gaussian
    """The distribution that the action came from; mean `[E, H, A]`, log_std `[E, H, A]`."""
    reward: jax.Array
    """`[E, H]`, 0 where the mask is."""
    mask: jax.Array
    """`[E, H]`: 1 for the steps that happened, which come first, and 0 after the end of an episode."""
    broken: jax.Array
    """`[E]`: 1 for episodes that were ended because an observation, action, reward or state was not finite."""

    def mean(self, values: jax.Array) -> jax.Array:
        """Mean of `[E, H]` over the steps that happened; 0 if there are none."""
        return (self.mask * values).sum() / jnp.maximum(self.mask.sum(), 1)


def rollout(
    environment: Environment, policy: Policy, params: Params, key: jax.Array, task: jax.Array, episodes: int
) -> Episodes:
    """Samples `E` episodes of one task.

    Nothing is differentiated through it. An observation, action, reward or state that is not finite ends its
    episode before that step, and is counted; the others go on.
    """
    params = lax.stop_gradient(params)
    reset_key, noise_key = jax.random.split(key)
    state = jax.vmap(environment.reset, (0, None))(jax.random.split(reset_key, episodes), task)
    shape = (environment.horizon, episodes, environment.action_size)
    noise = jax.random.normal(noise_key, shape, jax.tree.leaves(params)[0].dtype)

    def advance(carry: Any, noise: jax.Array) -> Any:
        state, alive = carry
        observation = jax.vmap(environment.observe, (0, None))(state, task)
        sampled = policy.apply(params, observation)
        action = sampled.mean + jnp.exp(sampled.log_std) * noise
        sound = jnp.isfinite(action).all(-1) & jnp.isfinite(observation).all(-1)
        given = jnp.where(sound[:, None], jnp.clip(action, -1, 1), 0)
        step: Step = jax.vmap(environment.step, (0, 0, None))(state, given, task)
        for leaf in jax.tree.leaves((step.reward, step.state)):
            sound &= jnp.isfinite(leaf).reshape(episodes, -1).all(-1)
        happened = alive & sound
        state = jax.tree.map(lambda new, old: jnp.where(_like(happened, new), new, old), step.state, state)
        seen = Episodes(
            observation=jnp.where(happened[:, None], observation, 0),
            action=jnp.where(happened[:, None], action, 0),
            sampled=jax.tree.map(
                lambda leaf: jnp.where(happened[:, None], jnp.broadcast_to(leaf, action.shape), 0), sampled
            ),
            reward=jnp.where(happened, step.reward, 0),
            mask=happened.astype(noise.dtype),
            broken=(alive & ~sound).astype(noise.dtype),
        )
        return (state, happened & ~step.done), seen

    _, seen = lax.scan(advance, (state, jnp.ones(episodes, bool)), noise)
    by_episode = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), seen)
    return by_episode._replace(broken=by_episode.broken.sum(1))


def _like(flags: jax.Array, leaf: jax.Array) -> jax.Array:
    return flags.reshape(flags.shape + (1,) * (leaf.ndim - 1))
