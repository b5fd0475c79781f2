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
    nan_actions = sample(jax.tree.map(lambda leaf: leaf * jnp.nan, params))
    assert nan_actions.nonfinite.all() and not nan_actions.mask.any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((sampled, nan_actions)))

    learner = small_learner(policy_gradient(optax.sgd(0.1)), environment)
    state = learner.init(params)
    after, info = compiled(learner.step)(state, task_batch_of(tasks))
    np.testing.assert_array_equal(info.aux["num_nonfinite"], [12, 0])
    np.testing.assert_array_equal(info.aux["length"], [3, 5])
    assert info.aux["kl"][0] > 0 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after.params, info)))


@pytest.mark.parametrize(("where", "length"), [("reset", 0), ("observe", 3)])
def test_a_nan_observation_ends_its_episode(where, length):
    """One of two tasks has NaN observations. The other task still trains."""

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
        return moved._replace(state=(moved.state, time + 1))

    environment = ENVIRONMENT._replace(reset=reset, step=step, observe=observe)
    learner = small_learner(policy_gradient(optax.sgd(0.1)), environment)
    task_batch = task_batch_of([[0.4, 0.4], [-0.4, 0.4]])
    after, info = compiled(learner.step)(learner.init(perturbed(POLICY)), task_batch)
    np.testing.assert_array_equal(info.aux["num_nonfinite"], [12, 0])
    np.testing.assert_array_equal(info.aux["length"], [length, 8])
    assert info.grad_norm > 0 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after.params, info)))
