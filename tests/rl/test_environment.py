"""The environment of the oracle, which observes the task, and checks of the values that environments return."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rl_cases import ENVIRONMENT, POLICY, compiled, perturbed

from maml_jax.rl.environment import Step, with_normalised_observations, with_task_observation
from maml_jax.rl.envs.navigation import navigation
from maml_jax.rl.meta_rl import draw_task_batch
from maml_jax.rl.policy import categorical_mlp, gaussian_mlp
from maml_jax.rl.rollout import rollout


def test_the_oracle_observes_the_task():
    environment = navigation()
    oracle = with_task_observation(environment)
    assert oracle.observation_size == 4 and oracle.name == "navigation-with-task"
    np.testing.assert_allclose(oracle.observe(jnp.array([0.1, -0.1]), jnp.array([0.1, -0.2])), [0.1, -0.1, 0.1, -0.2])
    number = environment._replace(sample_tasks=lambda key, count: jnp.ones(count, int))
    oracle = with_task_observation(number)
    assert oracle.observation_size == 3
    assert oracle.observe(jnp.array([0.1, -0.1]), jnp.array(1)).dtype == jnp.float32


def test_normalised_observations_have_mean_0_and_deviation_1():
    mean, deviation = jnp.array([0.5, 2.0]), jnp.array([0.25, 0.0])
    environment = with_normalised_observations(navigation(), mean, deviation)
    observed = [environment.observe(jnp.array(state), jnp.zeros(2)) for state in ([0.25, 2.0], [9.0, 2.1], [-9.0, 2.0])]
    np.testing.assert_allclose(observed, [[-1, 0], [10, 0], [-10, 0]])
    assert np.isnan(environment.observe(jnp.full(2, jnp.nan), jnp.zeros(2))).all()  # `rollout` ends the episode.
    assert environment.name == "navigation-normalised" and environment.observation_size == 2
    with pytest.raises(ValueError, match=r"deviation must have the shape \(2,\), .*'navigation', but .* \(3,\)"):
        with_normalised_observations(navigation(), 0.0, jnp.ones(3))


def sampled(environment, policy=POLICY, task=(0.4, 0.4)):
    return rollout(environment, policy, perturbed(policy), jax.random.key(0), jnp.asarray(task), 2)


def test_integer_rewards_and_numbers_as_ends_are_converted():
    """The reward is an int32 of shape [1], and `done` is a float of shape [1]. One task is truncated."""

    def step(state, action, task):
        position, time = state
        moved = ENVIRONMENT.step(position, action, task).state, time + 1
        return Step(moved, jnp.full(1, 3, jnp.int32), jnp.full(1, 1.0) * (time >= 4), (time >= 2) & (task[0] < 0))

    environment = ENVIRONMENT._replace(
        reset=lambda key, task: (jnp.zeros(2), jnp.zeros([], jnp.int32)),
        observe=lambda state, task: jnp.round(state[0]).astype(int),
        step=step,
    )
    tasks = jnp.array([[0.4, 0.4], [-0.4, 0.4]])
    episodes = compiled(jax.vmap(lambda task: sampled(environment, task=task)))(tasks)
    assert episodes.reward.dtype == episodes.observation.dtype == jnp.float32
    np.testing.assert_array_equal(episodes.reward[0], np.tile([3, 3, 3, 3, 3, 0, 0, 0], (2, 1)))
    np.testing.assert_array_equal(episodes.reward[1], np.tile([3, 3, 3, 0, 0, 0, 0, 0], (2, 1)))
    np.testing.assert_array_equal(episodes.terminated, [[1, 1], [0, 0]])


def returning(*values):
    """A step of the environment that returns given values in place of some of its own."""
    return lambda state, action, task: Step(state, *values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": returning(jnp.ones(2), False)}, r"one number as reward, but returned float32\[2\]"),
        ({"step": returning(1j, False)}, "one number as reward, but returned a value of type complex"),
        ({"step": returning(0.0, None)}, "one number as done, but returned a value of type NoneType"),
        (
            {"step": lambda state, action, task: (state, state, 0.0, False, {})},
            r"must return a Step\(state, reward, done\), but returned a tuple of 5 values",
        ),
        (
            {"step": lambda state, action, task: Step(state.astype(int), 0.0, False)},
            r"keep the type of state, float32\[2\], but returned int32\[2\]",
        ),
        (
            {"step": lambda state, action, task: Step((state, 0), 0.0, False)},
            "must return a state with the structure of the state from reset",
        ),
        ({"observe": lambda state, task: jnp.zeros(3)}, r"shape \(2,\), but returned float32\[3\]"),
        ({"observe": lambda state, task: {"x": state}}, r"shape \(2,\), but returned a value of type dict"),
        ({"action_size": 3}, r"continuous actions of size 3, but the policy gives a Gaussian of size 2.*gaussian_mlp"),
        ({"discrete": True}, r"discrete actions of size 2, but the .* Use a policy such as categorical_mlp\(2, 2\)"),
    ],
)
def test_values_of_another_form_raise(change, message):
    with pytest.raises((TypeError, ValueError), match=f"'navigation'.*{message}"):
        jax.eval_shape(lambda: sampled(ENVIRONMENT._replace(**change)))


def test_policies_and_tasks_of_another_form_raise():
    with pytest.raises(ValueError, match=r"continuous actions of size 2, but the policy gives a Categorical"):
        jax.eval_shape(lambda: sampled(ENVIRONMENT, categorical_mlp(2, 2)))
    with pytest.raises(ValueError, match=r"the policy gives a Gaussian of size 1\."):
        jax.eval_shape(lambda: sampled(ENVIRONMENT, gaussian_mlp(2, 1)))
    environment = ENVIRONMENT._replace(sample_tasks=lambda key, count: jnp.zeros(2))
    with pytest.raises(ValueError, match=r"'navigation' must return an array with a leading axis of 3 tasks, .*\(2,\)"):
        draw_task_batch(environment, jax.random.key(0), 3)
