"""2D navigation as a Gymnasium environment equals 2D navigation in JAX."""

from functools import partial

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.rl_cases import POLICY, compiled, perturbed

import maml_jax
from maml_jax.parallel.task_axis import task_mesh
from maml_jax.rl.envs.gymnasium import from_gymnasium
from maml_jax.rl.envs.navigation import GOAL_RADIUS, MAX_STEP, navigation
from maml_jax.rl.meta_rl import draw_task_batch, maml_rl
from maml_jax.rl.outer import policy_gradient

HORIZON, RANGE = 6, 0.5


class Walk(gymnasium.Env):
    """2D navigation as a Gymnasium environment. The bounds of the action space are not [-1, 1]."""

    made = 0
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(np.array([-2.0, 0.0]), np.array([2.0, 1.0]), dtype=np.float64)

    def __init__(self, near=GOAL_RADIUS):
        Walk.made += 1
        self.goal, self.near = None, near

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = np.zeros(2)
        return self.position, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.position = self.position + MAX_STEP * np.array([action[0] / 2, 2 * action[1] - 1])
        away = self.position - self.goal
        return self.position, -np.sqrt((away**2).sum()), bool((np.abs(away) < self.near).all()), False, {}


def set_goal(env, goal):
    env.goal = np.asarray(goal)


def gymnasium_navigation(make=Walk, horizon=HORIZON, **options):
    return from_gymnasium(make, set_goal, navigation().sample_tasks, horizon=horizon, **options)


@pytest.mark.parametrize("mesh", [None, task_mesh(4)], ids=["one device", "two devices"])
def test_a_meta_iteration_equals_the_meta_iteration_in_jax(mesh, x64_everywhere):
    found, made = [], Walk.made
    for environment in (navigation(HORIZON), gymnasium_navigation()):
        learner = maml_rl(
            environment, POLICY, maml_jax.sgd(0.1, steps=2), policy_gradient(optax.sgd(0.1)), episodes=3, mesh=mesh
        )
        state = learner.init(perturbed(POLICY))
        step = compiled(learner.step)
        for key in (1, 2):
            state, info = step(state, draw_task_batch(environment, jax.random.key(key), 4))
        found.append((state.params, info.loss, info.aux))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), *found)
    assert Walk.made - made == 4 * 3  # One simulator for each concurrent episode; the inner steps share them.


def test_episodes_end_at_their_goals(x64_everywhere):
    """The goal is wide, so episodes end at different times. Steps after the end do not count."""
    wide = gymnasium_navigation(partial(Walk, near=0.2), horizon=20)
    learner = maml_rl(wide, POLICY, maml_jax.no_adaptation(), policy_gradient(optax.identity()), episodes=5)
    evaluate = compiled(lambda state, key: learner.evaluate(state, draw_task_batch(wide, key, 6)))
    summary = evaluate(learner.init(perturbed(POLICY)), jax.random.key(0)).aux
    assert not summary.num_nonfinite.any() and np.isfinite(summary.mean_return).all()
    assert (summary.length < 20).any()


def test_the_simulator_of_a_nonfinite_episode_is_used_again(x64_everywhere):
    class Breaks(Walk):
        def step(self, action):
            position, *rest = super().step(action)
            return np.where(position[0] > 0, np.nan, position), *rest

    environment, made = gymnasium_navigation(Breaks), Walk.made
    learner = maml_rl(environment, POLICY, maml_jax.no_adaptation(), policy_gradient(optax.identity()), episodes=6)
    evaluate = compiled(lambda state, key: learner.evaluate(state, draw_task_batch(environment, key, 2)))
    counts = [
        evaluate(learner.init(perturbed(POLICY)), jax.random.key(key)).aux.num_nonfinite.sum() for key in range(4)
    ]
    assert min(counts) > 0 and Walk.made - made == 2 * 6 - 1  # `from_gymnasium` made the first simulator.


def test_spaces_and_horizons_that_are_not_allowed_raise():
    for change, message in (
        ({"action_space": gymnasium.spaces.Discrete(3)}, "action_space must be a Box, but got Discrete"),
        ({"observation_space": gymnasium.spaces.Discrete(3)}, "observation_space must be a Box"),
        ({"action_space": gymnasium.spaces.Box(-np.inf, 1, (2,))}, "action_space must have bounds"),
    ):
        with pytest.raises(ValueError, match=message):
            gymnasium_navigation(type("Other", (Walk,), change))
    with pytest.raises(ValueError, match="horizon must be an integer of at least 1, but got 0"):
        gymnasium_navigation(horizon=0)


def test_an_error_of_a_simulator_is_raised():
    class Broken(Walk):
        def step(self, action):
            raise RuntimeError("a joint broke")

    environment = gymnasium_navigation(Broken)
    state = environment.reset(jax.random.key(0), jnp.zeros(2))
    with pytest.raises(Exception, match="a joint broke"):
        jax.block_until_ready(environment.step(state, jnp.zeros(2), jnp.zeros(2)))
