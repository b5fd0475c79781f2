"""Rollouts: episodes of a policy in an environment, padded to the horizon, with a mask."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maml_jax.rl.environment import Environment, checked
from maml_jax.rl.policy import Categorical, Distribution, Gaussian, Policy
from maml_jax.types import Params


class Episodes(NamedTuple):
    """Episodes of one task. Entries where the mask is 0 are finite and have no meaning."""

    observation: jax.Array
    """`[E, H, O]`: the observation before each action."""
    action: jax.Array
    """`[E, H, A]`: the action as sampled. The environment gets the action clipped to [-1, 1]."""
    distribution: Distribution
    """The distribution that the action was sampled from; its arrays are `[E, H, A]`."""
    reward: jax.Array
    """`[E, H]`, 0 where the mask is 0."""
    mask: jax.Array
    """`[E, H]`: 1 for the time steps of an episode, 0 for the time steps after the end."""
    nonfinite: jax.Array
    """`[E]`: 1 for episodes that ended early because an observation, action, reward or state was not finite."""
    terminated: jax.Array
    """`[E]`: 1 for episodes that ended in a terminal state; 0 at the horizon, and if the environment truncated them."""
    last_observation: jax.Array
    """`[E, O]`: the observation after the last step, with 0 for entries that are not finite."""

    def mean(self, values: jax.Array) -> jax.Array:
        """Returns the mean of values `[E, H]` over the time steps where the mask is 1; 0 without such time steps."""
        return (self.mask * values).sum() / jnp.maximum(self.mask.sum(), 1)


def rollout(
    environment: Environment, policy: Policy, params: Params, key: jax.Array, task: jax.Array, episodes: int
) -> Episodes:
    """Samples `E` episodes of one task.

    Rollouts are not differentiated. An observation, action, reward or state that is not finite ends the episode before
    the current time step. The other episodes continue.

    Example:
      >>> import jax
      >>> from maml_jax.rl.envs.navigation import navigation
      >>> from maml_jax.rl.policy import gaussian_mlp
      >>> environment, policy = navigation(horizon=10), gaussian_mlp(2, 2, hidden=(8,))
      >>> params, goal = policy.init(jax.random.key(0)), jax.numpy.array([0.3, -0.2])
      >>> rollout(environment, policy, params, jax.random.key(1), goal, episodes=4).reward.shape
      (4, 10)

    Args:
      environment: the environment.
      policy: the policy.
      params: the parameters of the policy.
      key: a PRNG key for the initial states and the actions.
      task: one task of the environment.
      episodes: the number of episodes, `E`.

    Returns:
      The episodes, padded to the horizon `H`.

    Raises:
      TypeError, ValueError: if a function of the environment returns a value of another form than `Environment` and
        `Step` describe, or if the policy is for another number or another kind of actions.
    """
    environment = checked(environment)
    params = lax.stop_gradient(params)
    reset_key, noise_key = jax.random.split(key)
    state = jax.vmap(environment.reset, (0, None))(jax.random.split(reset_key, episodes), task)
    observe = jax.vmap(environment.observe, (0, None))
    shape = (environment.horizon, episodes, environment.action_size)
    example = jax.eval_shape(policy.apply, params, jax.eval_shape(observe, state, task))
    _check_policy(environment, example)
    noise = example.noise(noise_key, shape, jax.tree.leaves(params)[0].dtype)

    def time_step(carry: Any, noise: jax.Array) -> Any:
        state, running = carry
        # Sample an action.
        observation = observe(state, task)
        distribution = policy.apply(params, observation)
        action = distribution.sample(noise)
        # Step every environment, with a zero action where the action or the observation is not finite.
        finite = jnp.isfinite(action).all(-1) & jnp.isfinite(observation).all(-1)
        clipped = jnp.where(finite[:, None], jnp.clip(action, -1, 1), 0)
        step = jax.vmap(environment.step, (0, 0, None))(state, clipped, task)
        for leaf in jax.tree.leaves((step.reward, step.state)):
            finite &= jnp.isfinite(leaf).reshape(episodes, -1).all(-1)
        # Record the step of the episodes that have not ended.
        valid = running & finite
        state = jax.tree.map(lambda new, old: jnp.where(_broadcast(valid, new), new, old), step.state, state)
        recorded = dict(
            observation=jnp.where(valid[:, None], observation, 0),
            action=jnp.where(valid[:, None], action, 0),
            distribution=jax.tree.map(
                lambda leaf: jnp.where(valid[:, None], jnp.broadcast_to(leaf, action.shape), 0), distribution
            ),
            reward=jnp.where(valid, step.reward, 0),
            mask=valid.astype(noise.dtype),
            nonfinite=(running & ~finite).astype(noise.dtype),
            terminated=(valid & step.done & ~step.truncated).astype(noise.dtype),
        )
        return (state, valid & ~step.done), recorded

    (state, _), recorded = lax.scan(time_step, (state, jnp.ones(episodes, bool)), noise)
    ends = {name: recorded.pop(name).sum(0) for name in ("nonfinite", "terminated")}
    by_episode = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), recorded)
    last = observe(state, task)
    return Episodes(**by_episode, **ends, last_observation=jnp.where(jnp.isfinite(last), last, 0))


def _check_policy(environment: Environment, distribution: Distribution) -> None:
    """Raises ValueError if a distribution is for other actions than those of the environment."""
    sizes = {leaf.shape[-1] for leaf in jax.tree.leaves(distribution)}
    wrong_kind = isinstance(distribution, Gaussian if environment.discrete else Categorical)
    if sizes != {environment.action_size} or wrong_kind:
        kind, policy = ("discrete", "categorical_mlp") if environment.discrete else ("continuous", "gaussian_mlp")
        raise ValueError(
            f"The environment {environment.name!r} has {kind} actions of size {environment.action_size}, but the "
            f"policy gives a {type(distribution).__name__} of size {', '.join(map(str, sorted(sizes)))}. Use a policy "
            f"such as {policy}({environment.observation_size}, {environment.action_size})."
        )


def _broadcast(flags: jax.Array, leaf: jax.Array) -> jax.Array:
    return flags.reshape(flags.shape + (1,) * (leaf.ndim - 1))
