"""2D navigation: steps, rewards, ends of episodes, and tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maml_jax.rl.envs.navigation import navigation


def test_steps_rewards_ends_and_goals_follow_the_rules():
    environment = navigation()
    task = jnp.array([0.1, -0.2])
    state = environment.reset(jax.random.key(0), task)
    step = environment.step(state, jnp.array([1.0, -1.0]), task)
    np.testing.assert_allclose(step.state, [0.1, -0.1])
    np.testing.assert_allclose(step.reward, -0.1, rtol=1e-6)
    assert not step.done and environment.step(step.state, jnp.array([0.05, -0.95]), task).done
    assert not environment.step(step.state, jnp.array([0.11, -1.0]), task).done  # 0.011 away along one axis.
    goals = environment.sample_tasks(jax.random.key(0), 1000)
    assert goals.min() < -0.49 and goals.max() > 0.49 and jnp.abs(goals).max() <= 0.5


def test_a_horizon_below_1_raises():
    with pytest.raises(ValueError, match="horizon must be an integer of at least 1, but got 0"):
        navigation(horizon=0)
