"""Gymnasium environments: 2D navigation equals 2D navigation in JAX; CartPole; and wrong interfaces."""

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
from maml_jax.rl.advantage import summary
from maml_jax.rl.envs.gymnasium import from_gymnasium
from maml_jax.rl.envs.navigation import GOAL_RADIUS, MAX_STEP, navigation
from maml_jax.rl.meta_rl import draw_task_batch, maml_rl
from maml_jax.rl.outer import policy_gradient
from maml_jax.rl.policy import categorical_mlp
from maml_jax.rl.rollout import rollout
from maml_jax.rl.trust_region import trpo

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
        (
            {"action_space": gymnasium.spaces.MultiBinary(3)},
            "action_space must be a Box or Discrete, but 'walk'",
        ),
        (
            {"observation_space": gymnasium.spaces.Sequence(Walk.action_space)},
            "observation_space must be of a fixed",
        ),
        (
            {"action_space": gymnasium.spaces.Box(-np.inf, 1, (2,))},
            "action_space must have finite bounds, but 'walk'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            gymnasium_navigation(type("Other", (Walk,), change), name="walk")
    with pytest.raises(ValueError, match="horizon must be an integer of at least 1, but got 0"):
        gymnasium_navigation(horizon=0)


class OldReset(Walk):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0]


class OldTuple(Walk):
    def reset(self, *, seed=None, options=None):
        return tuple(super().reset(seed=seed)[0])


class OldStep(Walk):
    def step(self, action):
        position, reward, done, _, info = super().step(action)
        return position, reward, done, info


class NoSeed(Walk):
    def reset(self):
        return super().reset()


def returns(place, value):
    """An environment with another value in one place of the result of a step."""

    class Changed(Walk):
        def step(self, action):
            returned = [*super().step(action)]
            returned[place] = value
            return tuple(returned)

    return Changed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (OldReset, r"reset of 'walk' must return \(observation, info\), but returned an array of shape \(2,\)"),
        (OldTuple, r"reset of 'walk' must return \(observation, info\), but returned a tuple of 2 values"),
        (OldStep, r"step of 'walk' must return \(observation, .*, info\), but returned a tuple of 4 values"),
        (NoSeed, "reset of 'walk' must take the argument seed"),
        (returns(0, np.zeros(3)), r"step of 'walk' must return an observation of 2 numbers, but .* of shape \(3,\)"),
        (returns(0, {"x": 1}), "step of 'walk' must return an observation of 2 numbers, but returned {'x': 1} of type"),
        (returns(1, np.ones(2)), r"one number as reward, but returned an array of shape \(2,\) and type float64"),
        (returns(1, None), "one number as reward, but returned None of type NoneType"),
        (returns(2, "no"), "one number as terminated, but returned 'no' of type str"),
        (returns(3, []), r"one number as truncated, but returned \[\] of type list"),
    ],
)
def test_values_of_another_form_raise_before_training(make, message):
    with pytest.raises(ValueError, match=message):
        gymnasium_navigation(make, name="walk")


def test_a_simulator_of_another_package_and_tasks_of_another_shape_raise():
    with pytest.raises(ValueError, match=r"sample_tasks of the environment 'walk' .* 1 tasks, .* the shape \(\)"):
        from_gymnasium(Walk, set_goal, lambda key, count: jnp.zeros([]), horizon=2, name="walk")
    with pytest.raises(TypeError, match=r"make must return a gymnasium\.Env, but returned <object object"):
        gymnasium_navigation(object)


def test_actions_of_a_box_of_integers_are_rounded(x64_everywhere):
    class Whole(Walk):
        action_space = gymnasium.spaces.Box(0, 10, (2,), np.int64)

        def step(self, action):
            return action, *super().step(action)[1:]

    environment = gymnasium_navigation(Whole)
    state = environment.reset(jax.random.key(0), jnp.ones(2))
    step = environment.step(state, jnp.array([0.16, -0.98]), jnp.ones(2))
    np.testing.assert_array_equal(step.state.observation, [6, 0])


def test_rewards_and_ends_may_be_arrays_of_one_number(x64_everywhere):
    class Ones(Walk):
        def step(self, action):
            position, _, near, _, info = super().step(action)
            return position, np.array([3]), np.array([float(near)]), np.array([0]), info

    environment = gymnasium_navigation(Ones)
    step = environment.step(environment.reset(jax.random.key(0), jnp.ones(2)), jnp.zeros(2), jnp.ones(2))
    assert step.reward == 3 and step.reward.dtype == float and not step.done and not step.truncated


class Line(gymnasium.Env):
    """Five places in a line. The actions 7 and 8 move left and right. A task is a goal and a time limit."""

    observation_space, action_space = gymnasium.spaces.Discrete(5), gymnasium.spaces.Discrete(2, start=7)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.time = 2, 0
        return self.place, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.place, self.time = min(max(self.place + (1 if action == 8 else -1), 0), 4), self.time + 1
        return self.place, float(action == 8), self.place == self.goal[0], self.time == self.goal[1], {}


def test_discrete_actions_are_taken_and_ends_are_told_apart():
    environment = from_gymnasium(
        Line, set_goal, lambda key, count: jax.random.randint(key, (count, 2), 1, 5), horizon=6, name="line"
    )
    assert (environment.observation_size, environment.action_size, environment.discrete) == (5, 2, True)
    policy = categorical_mlp(5, 2, hidden=())
    params = jax.tree.map(jnp.zeros_like, policy.init(jax.random.key(0)))

    @compiled
    def sample(bias, limit):
        moved = {"Dense_0": {**params["Dense_0"], "bias": jnp.array([-bias, bias])}}
        return rollout(environment, policy, moved, jax.random.key(0), jnp.array([4, limit]), 2)

    right, truncated, both, mixed = (sample(*case) for case in ((50.0, 4), (-50.0, 4), (50.0, 2), (0.0, 4)))
    np.testing.assert_array_equal(right.mask, np.tile([1, 1, 0, 0, 0, 0], (2, 1)))
    np.testing.assert_array_equal(right.reward, right.mask)
    np.testing.assert_array_equal(right.action[:, :2], np.tile([0, 1], (2, 2, 1)))
    np.testing.assert_array_equal(right.observation[:, :2].argmax(-1), [[2, 3]] * 2)
    np.testing.assert_array_equal(right.last_observation.argmax(-1), [4, 4])
    np.testing.assert_array_equal(truncated.mask.sum(1), [4, 4])  # The time limit of the environment.
    assert both.terminated.all() and (both.mask == right.mask).all()  # A terminal state at the time limit.
    assert right.terminated.all() and not truncated.terminated.any() and not right.nonfinite.any()
    assert summary(right).terminated == 1 and summary(truncated).terminated == 0
    actions = mixed.action[mixed.mask > 0]
    assert (actions.sum(1) == 1).all()
    nan = sample(jnp.nan, 4)
    assert nan.nonfinite.all() and not nan.mask.any()


def test_trpo_learns_to_balance_poles_of_different_lengths():
    """The task is half the length of the pole. CartPole has discrete actions, and ends when the pole falls."""

    def set_length(cart_pole, length):
        cart_pole.length = float(length)
        cart_pole.polemass_length = cart_pole.masspole * cart_pole.length

    environment = from_gymnasium(
        lambda: gymnasium.make("CartPole-v1"),
        set_length,
        lambda key, count: jax.random.uniform(key, (count,), minval=0.3, maxval=1.0),
        horizon=60,
        name="cart-pole",
    )
    starts = [environment.reset(jax.random.key(key), jnp.array(0.5)).observation for key in (0, 0, 1)]
    assert (starts[0] == starts[1]).all() and (starts[0] != starts[2]).any()  # The key is the seed of a simulator.
    policy = categorical_mlp(environment.observation_size, environment.action_size, hidden=(16,))
    learner = maml_rl(environment, policy, maml_jax.sgd(0.1, steps=1), trpo(0.03), episodes=8, bootstrap=True)
    state, step = learner.init(policy.init(jax.random.key(0))), compiled(learner.step)
    found = []
    for index in range(12):
        state, info = step(state, draw_task_batch(environment, jax.random.key(index), 4))
        found.append(float(info.aux["return"].mean()))
    assert np.mean(found[-3:]) > 1.3 * np.mean(found[:2]), found  # Rounding changes the returns of later iterations.


def test_an_error_of_a_simulator_is_raised():
    class Broken(Walk):
        def step(self, action):
            if self.goal[0] > 5:
                raise RuntimeError("a joint broke")
            return super().step(action)

    environment, task = gymnasium_navigation(Broken), jnp.full(2, 9.0)
    state = environment.reset(jax.random.key(0), task)
    with pytest.raises(Exception, match="a joint broke"):
        jax.block_until_ready(environment.step(state, jnp.zeros(2), task))
