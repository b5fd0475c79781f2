"""What an environment is: a few pure functions, with the task as an array.

Dimensions, beside those of `maml_jax.types`: `E` episodes, `H` time steps (the horizon), `O` numbers in
an observation, `A` in an action. Here every function is of one episode; `vmap` adds episodes and tasks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

State: TypeAlias = Any
"""Any pytree of floating-point arrays: all that the next step needs."""


class Step(NamedTuple):
    """What one time step leads to."""

    state: State
    reward: jax.Array
    done: jax.Array
    """Whether the episode ends here, by the rules of the environment; the horizon is not its concern."""


class Environment(NamedTuple):
    """A family of Markov decision processes that differ in their task."""

    name: str
    observation_size: int
    action_size: int
    horizon: int
    """Time steps after which every episode ends."""
    sample_tasks: Callable[[jax.Array, int], jax.Array]
    """`(key, T) -> [T, ...]`: tasks from the family's distribution."""
    check_tasks: Callable[[Any], None]
    """Raises ValueError for tasks `[T, ...]` that are not of the family, saying what is allowed."""
    reset: Callable[[jax.Array, jax.Array], State]
    """`(key, task) -> state`: a start."""
    observe: Callable[[State, jax.Array], jax.Array]
    """`(state, task) -> [O]`."""
    step: Callable[[State, jax.Array, jax.Array], Step]
    """`(state, action, task) -> Step`, for an action `[A]` within [-1, 1]."""


def told(environment: Environment) -> Environment:
    """The same environment with the task as a part of the observation, for the oracle of the paper."""
    task = jax.eval_shape(lambda: environment.sample_tasks(jax.random.key(0), 1))

    def observe(state: State, task: jax.Array) -> jax.Array:
        observation = environment.observe(state, task)
        return jnp.concatenate([observation, jnp.ravel(task).astype(observation.dtype)])

    return environment._replace(
        name=f"{environment.name}-told", observation_size=environment.observation_size + task.size, observe=observe
    )
