"""Environments as pure functions, with the task as an array.

Dimensions, beside those of `maml_jax.types`: `E` episodes, `H` time steps (the horizon), `O` entries of an
observation, `A` entries of an action. The functions of an environment take one episode. `vmap` adds axes for
episodes and tasks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

State: TypeAlias = Any
"""A pytree of arrays with everything that the next time step needs."""


class Step(NamedTuple):
    """The result of one time step."""

    state: State
    reward: jax.Array
    done: jax.Array
    """Whether the episode ends after this step, by the rules of the environment. The horizon is not considered."""


class Environment(NamedTuple):
    """A family of Markov decision processes, one for each task."""

    name: str
    observation_size: int
    """`O`."""
    action_size: int
    """`A`."""
    horizon: int
    """`H`: time steps after which every episode ends."""
    sample_tasks: Callable[[jax.Array, int], jax.Array]
    """`(key, T) -> [T, ...]`: samples tasks from the distribution of the family."""
    reset: Callable[[jax.Array, jax.Array], State]
    """`(key, task) -> state`: samples an initial state."""
    observe: Callable[[State, jax.Array], jax.Array]
    """`(state, task) -> [O]`: the observation of a state."""
    step: Callable[[State, jax.Array, jax.Array], Step]
    """`(state, action, task) -> Step`: takes one time step, with an action `[A]` in [-1, 1]."""


def with_task_observation(environment: Environment) -> Environment:
    """Returns the same environment with the task appended to the observation, for the oracle of the paper.

    Example:
      >>> from maml_jax.rl.envs.navigation import navigation
      >>> with_task_observation(navigation()).observation_size  # The position and the goal.
      4

    Args:
      environment: any environment. Each task is flattened to a vector.

    Returns:
      An environment whose `observation_size` is larger by the number of entries of a task.
    """
    task = jax.eval_shape(lambda: environment.sample_tasks(jax.random.key(0), 1))

    def observe(state: State, task: jax.Array) -> jax.Array:
        observation = environment.observe(state, task)
        return jnp.concatenate([observation, jnp.ravel(task).astype(observation.dtype)])

    return environment._replace(
        name=f"{environment.name}-with-task",
        observation_size=environment.observation_size + task.size,
        observe=observe,
    )
