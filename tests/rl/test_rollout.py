"""Rollouts with values that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.rl_cases import (
    ENVIRONMENT,
    POLICY,
    compiled,
    perturbed,
    small_learner,
    task_batch_of,
)

from maml_jax.rl.environment import Step
from maml_jax.rl.envs.navigation import MAX_STEP
from maml_jax.rl.outer import policy_gradient
from maml_jax.rl.rollout import rollout


def brittle(environment):
    """An environment with a NaN in the fourth state if the goal has x > 0. Other episodes end after five steps."""

    def reset(key, task):
        return environment.reset(key, task), jnp.zeros([])

    def step(state, action, task):
        position, time = state
        position = jnp.where((time >= 3) & (task[0] > 0), jnp.nan, environment.step(position, action, task).state)
        return Step((position, time + 1), -jnp.ones([]), time >= 4)

    return environment._replace(
        reset=reset, step=step, observe=lambda state, task: environment.observe(state[0], task)
    )  # fmt: skip


def test_a_nan_state_ends_its_episode_and_is_counted():
    environment = brittle(ENVIRONMENT)
    tasks = jnp.array([[0.4, 0.4], [-0.4, 0.4]])
    params = perturbed(POLICY)

    @compiled
    def sample(params):
        return jax.vmap(lambda task: rollout(environment, POLICY, params, jax.random.key(0), task, 5))(tasks)

    sampled = sample(params)
    np.testing.assert_array_equal(sampled.nonfinite, [[1] * 5, [0] * 5])
    for mask, length in zip(sampled.mask, (3, 5)):
        np.testing.assert_array_equal(mask, np.tile(np.arange(8) < length, (5, 1)))
    np.testing.assert_array_equal(sampled.reward, -sampled.mask)
    np.testing.assert_array_equal(sampled.terminated, [[0] * 5, [1] * 5])
    # The deviation is that of the policy, and the last action leads to the last observation.
    np.testing.assert_allclose(sampled.distribution.log_std, sampled.mask[..., None] * params["log_std"], rtol=1e-6)
    before, action = sampled.observation[1, :, 4], sampled.action[1, :, 4]
    np.testing.assert_allclose(sampled.last_observation[1], before + MAX_STEP * jnp.clip(action, -1, 1), rtol=1e-6)
    nan_actions = sample(jax.tree.map(lambda leaf: leaf * jnp.nan, params))
    assert nan_actions.nonfinite.all() and not nan_actions.mask.any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((sampled, nan_actions)))

    learner = small_learner(policy_gradient(optax.sgd(0.1)), environment)
    state = learner.init(params)
    after, info = compiled(learner.step)(state, task_batch_of(tasks))
    np.testing.assert_array_equal(info.aux["num_nonfinite"], [12, 0])
    np.testing.assert_array_equal(info.aux["length"], [3, 5])
    assert info.aux["kl"][0] > 0 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after.params, info)))


def test_episodes_have_different_starts_and_noise_and_no_derivatives():
    environment = ENVIRONMENT._replace(reset=lambda key, task: jax.random.normal(key, (2,)))
    params = perturbed(POLICY)

    @compiled
    def sample_and_gradient(key):
        def total(params):
            episodes = rollout(environment, POLICY, params, key, jnp.zeros(2), 3)
            return episodes.action.sum(), episodes

        return jax.grad(total, has_aux=True)(params)

    gradient, episodes = sample_and_gradient(jax.random.key(0))
    _, others = sample_and_gradient(jax.random.key(1))
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))
    starts = np.concatenate([each.observation[:, 0] for each in (episodes, others)])
    assert len(np.unique(starts)) == 2 * 3 * 2
    standardised = (episodes.action - episodes.distribution.mean) / jnp.exp(episodes.distribution.log_std)
    assert len(np.unique(np.round(standardised, 4))) > 0.9 * standardised.size
    assert (jnp.abs(episodes.action) > 1).any()  # Recorded as sampled; the environment got the clipped action.
    moved = MAX_STEP * jnp.clip(episodes.action[:, :-1], -1, 1)
    np.testing.assert_allclose(jnp.diff(episodes.observation, axis=1), moved, atol=1e-6)


@pytest.mark.parametrize(("where", "length"), [("reset", 0), ("observe", 3), ("reward", 3)])
def test_a_nan_observation_or_reward_ends_its_episode(where, length):
    """One of two tasks has NaN observations or rewards. The other task still trains."""

    def nan_if(position, task, when):
        return jnp.where((task[0] > 0) & when, jnp.nan, position)

    def reset(key, task):
        return nan_if(ENVIRONMENT.reset(key, task), task, where == "reset"), jnp.zeros([])

    def observe(state, task):
        position, time = state
        return nan_if(ENVIRONMENT.observe(position, task), task, (where == "observe") & (time > 2))

    def step(state, action, task):
        position, time = state
        moved = ENVIRONMENT.step(position, action, task)
        reward = nan_if(moved.reward, task, (where == "reward") & (time > 2))
        return moved._replace(state=(moved.state, time + 1), reward=reward)

    environment = ENVIRONMENT._replace(reset=reset, step=step, observe=observe)
    learner = small_learner(policy_gradient(optax.sgd(0.1)), environment, bootstrap=True)
    task_batch = task_batch_of([[0.4, 0.4], [-0.4, 0.4]])
    after, info = compiled(learner.step)(learner.init(perturbed(POLICY)), task_batch)
    np.testing.assert_array_equal(info.aux["num_nonfinite"], [12, 0])
    np.testing.assert_array_equal(info.aux["length"], [length, 8])
    assert info.grad_norm > 0 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after.params, info)))
