"""The environment of the oracle, which observes the task."""

import jax.numpy as jnp
import numpy as np

from maml_jax.rl.environment import with_task_observation
from maml_jax.rl.envs.navigation import navigation


def test_the_oracle_observes_the_task():
    environment = navigation()
    oracle = with_task_observation(environment)
    assert oracle.observation_size == 4 and oracle.name == "navigation-with-task"
    np.testing.assert_allclose(oracle.observe(jnp.array([0.1, -0.1]), jnp.array([0.1, -0.2])), [0.1, -0.1, 0.1, -0.2])
    number = environment._replace(sample_tasks=lambda key, count: jnp.ones(count, int))
    oracle = with_task_observation(number)
    assert oracle.observation_size == 3
    assert oracle.observe(jnp.array([0.1, -0.1]), jnp.array(1)).dtype == jnp.float32
