"""Environments as pure functions, with the task as an array.

Dimensions, beside those of `maml_jax.types`: `E` episodes, `H` time steps (the horizon), `O` entries of an
observation, `A` entries of an action. The functions of an environment take one episode. `vmap` adds axes for
episodes and tasks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

State: TypeAlias = Any
"""A pytree of arrays with everything that the next time step needs."""


class Step(NamedTuple):
    """The result of one time step."""

    state: State
    reward: jax.Array
    """A number."""
    done: jax.Array
    """Whether the episode ends after this step, by the rules of the environment. The horizon is not considered."""
    truncated: jax.Array | bool = False
    """Whether the episode ends at a limit, such as a time limit, and not in a terminal state. `done` may then be false
    or true."""


class Environment(NamedTuple):
    """A family of Markov decision processes, one for each task."""

    name: str
    observation_size: int
    """`O`."""
    action_size: int
    """`A`; for discrete actions, their number."""
    horizon: int
    """`H`: time steps after which every episode ends."""
    sample_tasks: Callable[[jax.Array, int], jax.Array]
    """`(key, T) -> [T, ...]`: samples tasks from the distribution of the family."""
    reset: Callable[[jax.Array, jax.Array], State]
    """`(key, task) -> state`: samples an initial state."""
    observe: Callable[[State, jax.Array], jax.Array]
    """`(state, task) -> [O]`: the observation of a state."""
    step: Callable[[State, jax.Array, jax.Array], Step]
    """`(state, action, task) -> Step`: takes one time step, with an action `[A]` in [-1, 1]. A discrete action is a
    one-hot vector."""
    discrete: bool = False
    """Whether the actions are discrete."""


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


def with_normalised_observations(
    environment: Environment, mean: jax.Array | float, deviation: jax.Array | float
) -> Environment:
    """Returns the same environment with observations of about mean 0 and standard deviation 1, clipped to [-10, 10].

    The statistics are constants. Estimate them before the training, for example from `rollout` with the initial policy.

    Example:
      >>> from maml_jax.rl.envs.navigation import navigation
      >>> environment = with_normalised_observations(navigation(), jnp.array([0.1, 0.0]), jnp.array([0.5, 0.5]))
      >>> print(environment.observe(jnp.array([0.6, 9.0]), jnp.zeros(2)))
      [ 1. 10.]

    Args:
      environment: any environment.
      mean: `[O]`, or a number: the mean of each entry of an observation.
      deviation: `[O]`, or a number: the standard deviation of each entry. An entry with deviation 0 becomes 0.

    Raises:
      ValueError: if a shape is not `[O]` or `[]`.
    """
    for name, values in (("mean", mean), ("deviation", deviation)):
        if jnp.shape(values) not in ((), (environment.observation_size,)):
            raise ValueError(
                f"{name} must have the shape ({environment.observation_size},), as the observations of "
                f"{environment.name!r}, but has the shape {jnp.shape(values)}."
            )

    def observe(state: State, task: jax.Array) -> jax.Array:
        centred = environment.observe(state, task) - mean
        return jnp.clip(centred / jnp.where(jnp.asarray(deviation) > 0, deviation, jnp.inf), -10, 10)

    return environment._replace(name=f"{environment.name}-normalised", observe=observe)


def checked(environment: Environment) -> Environment:
    """Returns the same environment with checks of the values that its functions return.

    The checks run while the functions are traced. Observations and rewards that are integers become floating-point
    numbers. The numbers of a `Step` may have the shape [1], and `done` and `truncated` may be numbers.

    Example:
      >>> from maml_jax.rl.envs.navigation import navigation
      >>> environment = navigation()
      >>> environment = environment._replace(step=lambda state, action, task: Step(state, jnp.array([1]), 0.0))
      >>> step = checked(environment).step(jnp.zeros(2), jnp.zeros(2), jnp.zeros(2))
      >>> print(step.reward, step.done)
      1.0 False

    Args:
      environment: any environment.

    Returns:
      An environment whose functions raise TypeError or ValueError for values of another form. The message names the
      environment and the value.
    """

    def sample_tasks(key: jax.Array, count: int) -> jax.Array:
        tasks = environment.sample_tasks(key, count)
        if jnp.shape(tasks)[:1] != (count,):
            raise ValueError(
                f"sample_tasks of the environment {environment.name!r} must return an array with a leading axis of "
                f"{count} tasks, but returned the shape {jnp.shape(tasks)}."
            )
        return tasks

    def observe(state: State, task: jax.Array) -> jax.Array:
        observation, expected = environment.observe(state, task), (environment.observation_size,)
        if not _is_real(observation) or jnp.shape(observation) != expected:
            raise ValueError(
                f"observe of the environment {environment.name!r} must return an array of shape {expected}, but "
                f"returned {_describe(observation)}."
            )
        return _as_float(observation)

    def step(state: State, action: jax.Array, task: jax.Array) -> Step:
        returned = environment.step(state, action, task)
        if not isinstance(returned, Step):
            raise TypeError(
                f"step of the environment {environment.name!r} must return a Step(state, reward, done), but returned "
                f"{_describe(returned)}."
            )
        for name in ("reward", "done", "truncated"):
            value = getattr(returned, name)
            if not _is_real(value) or jnp.shape(value) not in ((), (1,)):
                raise ValueError(
                    f"step of the environment {environment.name!r} must return one number as {name}, but returned "
                    f"{_describe(value)}."
                )
        _check_state(environment.name, state, returned.state)
        reward, done, truncated = (jnp.reshape(value, ()) for value in returned[1:])
        truncated = truncated.astype(bool)
        return Step(returned.state, _as_float(reward), done.astype(bool) | truncated, truncated)

    return environment._replace(sample_tasks=sample_tasks, observe=observe, step=step)


def _check_state(name: str, old: State, new: State) -> None:
    """Raises ValueError unless the state after a step has the form of the state before."""
    structure: Any = jax.tree.structure(old)
    other: Any = jax.tree.structure(new)
    if structure != other:
        raise ValueError(
            f"step of the environment {name!r} must return a state with the structure of the state from reset, "
            f"{structure}, but returned {other}."
        )
    for (path, leaf), changed in zip(jax.tree.leaves_with_path(old), jax.tree.leaves(new)):
        if _describe(leaf) != _describe(changed):
            raise ValueError(
                f"step of the environment {name!r} must keep the type of state{jax.tree_util.keystr(path)}, "
                f"{_describe(leaf)}, but returned {_describe(changed)}."
            )


def _is_real(value: Any) -> bool:
    """Whether a value is an array or a number, and not complex."""
    if not isinstance(value, jax.Array | np.ndarray | np.generic | bool | int | float):
        return False
    kinds = (jnp.bool_, jnp.integer, jnp.floating)
    return any(jnp.issubdtype(jnp.result_type(value), kind) for kind in kinds)


def _as_float(value: Any) -> jax.Array:
    array = jnp.asarray(value)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.result_type(float))


def _describe(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)} values"
    if isinstance(value, bool | int | float) or hasattr(value, "dtype"):
        return f"{jnp.result_type(value)}{[*jnp.shape(value)]}"
    return f"a value of type {type(value).__name__}"
