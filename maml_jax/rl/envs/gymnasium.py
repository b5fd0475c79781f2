"""Gymnasium environments as an `Environment`.

A Gymnasium environment keeps its state in Python. Every running episode therefore has a simulator on the host. The JAX
state holds the number of the episode, by which the host finds the simulator. The simulators step one after the other.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax import validation
from maml_jax.rl.environment import Environment, Step


class EpisodeState(NamedTuple):
    """The part of an episode's state that JAX holds."""

    ticket: Any
    """int32: the number of the episode."""
    time: Any
    """int32: time steps taken."""
    observation: Any
    """`[O]`: the observation of the current state."""


def from_gymnasium(
    make: Callable[[], Any],
    set_task: Callable[[Any, np.ndarray], None],
    sample_tasks: Callable[[jax.Array, int], jax.Array],
    *,
    horizon: int,
    name: str = "gymnasium",
) -> Environment:
    """Makes an `Environment` of Gymnasium simulators.

    Args:
      make: a function without arguments that makes a `gymnasium.Env` with Box spaces. `from_gymnasium` calls `make`
        once. Rollouts call `make` again when more episodes run at the same time.
      set_task: `(env.unwrapped, task) -> None`: sets the task of a simulator, before each reset.
      sample_tasks: `(key, T) -> [T, ...]`: a JAX function that samples tasks.
      horizon: `H`, time steps after which an episode ends. An episode also ends if the simulator returns 'terminated'
        or 'truncated'.
      name: the name of the environment.

    Returns:
      The environment. Actions in [-1, 1] are scaled to the bounds of the action space, and observations are flattened.
      Episodes are reproducible if a simulator is deterministic for a given seed. An exception in a simulator ends the
      program. For float64, set jax_enable_x64 with `jax.config.update`, which applies to all threads.

    Raises:
      ModuleNotFoundError: if gymnasium is not installed.
      ValueError: for a horizon below 1, for a space that is not a Box, or for an action space without bounds.

    Example:
      >>> import gymnasium, jax, jax.numpy as jnp
      >>> def set_task(pendulum, task):
      ...     pendulum.g = float(task)
      >>> environment = from_gymnasium(
      ...     lambda: gymnasium.make("Pendulum-v1"),
      ...     set_task,
      ...     lambda key, count: jax.random.uniform(key, (count,), minval=5.0, maxval=15.0),  # Gravity in m/s^2.
      ...     horizon=200,
      ... )
      >>> state = environment.reset(jax.random.key(0), jnp.array(10.0))
      >>> environment.observe(state, jnp.array(10.0)).shape
      (3,)

    References:
      Towers et al. 2024, arXiv:2407.17032 (Gymnasium).
    """
    try:
        from gymnasium.spaces import Box
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Gymnasium environments need the package gymnasium: pip install 'maml-jax[gymnasium]', or in a checkout "
            "pip install -e '.[gymnasium]'."
        ) from error
    validation.at_least("horizon", horizon, 1)
    first = make()
    for kind, space in (("observation_space", first.observation_space), ("action_space", first.action_space)):
        if not isinstance(space, Box):
            raise ValueError(f"{kind} must be a Box, but got {space}.")
    if not np.isfinite([first.action_space.low, first.action_space.high]).all():
        raise ValueError(f"action_space must have bounds, but got {first.action_space}.")
    size = int(np.prod(first.observation_space.shape))
    simulators = _Simulators(make, set_task, first, horizon, size)

    def reset(key: jax.Array, task: jax.Array) -> EpisodeState:
        dtype = jnp.result_type(float)
        shapes = (jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((size,), dtype))
        seed = jax.random.bits(key, dtype=jnp.uint32)
        start = partial(simulators.reset, dtype)
        ticket, observation = jax.pure_callback(start, shapes, seed, task, vmap_method="broadcast_all")
        return EpisodeState(ticket, jnp.zeros([], jnp.int32), observation)

    def step(state: EpisodeState, action: jax.Array, task: jax.Array) -> Step:
        dtype = state.observation.dtype
        shapes = tuple(jax.ShapeDtypeStruct(*shape) for shape in (((size,), dtype), ((), dtype), ((), bool)))
        advance = partial(simulators.step, dtype)
        observation, reward, done = jax.pure_callback(
            advance, shapes, state.ticket, state.time, action, vmap_method="broadcast_all"
        )
        return Step(EpisodeState(state.ticket, state.time + 1, observation), reward, done)

    return Environment(
        name=name,
        observation_size=size,
        action_size=int(np.prod(first.action_space.shape)),
        horizon=horizon,
        sample_tasks=sample_tasks,
        reset=reset,
        observe=lambda state, task: state.observation,
        step=step,
    )


class _Episode:
    """A running episode: its simulator, and the time steps taken."""

    def __init__(self, env: Any):
        self.env, self.time = env, 0


class _Simulators:
    """The simulators of all running episodes, by the number of the episode (ticket). Simulators are reused."""

    def __init__(self, make: Any, set_task: Any, first: Any, horizon: int, size: int):
        self._make, self._set_task, self._horizon, self._size = make, set_task, horizon, size
        self._space = first.action_space
        self._idle = [first]
        self._running: dict[int, _Episode] = {}
        self._tickets = 0
        self._lock = threading.Lock()  # Several devices call at the same time.

    def reset(self, dtype: Any, seeds: Any, tasks: Any) -> tuple[np.ndarray, np.ndarray]:
        seeds = np.asarray(seeds)
        rows = np.asarray(tasks).reshape(seeds.size, *np.shape(tasks)[seeds.ndim :])
        tickets, observations = np.zeros(seeds.size, np.int32), np.zeros((seeds.size, self._size))
        with self._lock:
            for row, (seed, task) in enumerate(zip(seeds.ravel(), rows)):
                env = self._idle.pop() if self._idle else self._make()
                self._set_task(env.unwrapped, task)
                observation, _ = env.reset(seed=int(seed))
                self._tickets = (self._tickets + 1) % (1 << 31)
                tickets[row], observations[row] = self._tickets, np.ravel(observation)
                self._running[self._tickets] = _Episode(env)
        return tickets.reshape(seeds.shape), observations.reshape(*seeds.shape, self._size).astype(dtype)

    def step(self, dtype: Any, tickets: Any, times: Any, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tickets, times = np.asarray(tickets), np.asarray(times)
        actions = np.asarray(actions).reshape(tickets.size, -1)
        observations, rewards = np.full((tickets.size, self._size), np.nan), np.full(tickets.size, np.nan)
        done = np.zeros(tickets.size, bool)
        with self._lock:
            for row, (ticket, time) in enumerate(zip(tickets.ravel().tolist(), times.ravel().tolist())):
                episode = self._running.get(ticket)
                # The episode has ended, so nothing uses this row. NaN reveals an error.
                if episode is None:
                    continue
                if episode.time != time:  # JAX ended the episode, because a value was not finite.
                    self._idle.append(self._running.pop(ticket).env)
                    continue
                low, high = self._space.low, self._space.high
                action = low + (actions[row].reshape(low.shape) + 1) / 2 * (high - low)
                observation, reward, terminated, truncated, _ = episode.env.step(action.astype(self._space.dtype))
                observations[row], rewards[row], done[row] = np.ravel(observation), reward, terminated or truncated
                episode.time += 1
                if done[row] or episode.time == self._horizon:
                    self._idle.append(self._running.pop(ticket).env)
        shape = tickets.shape
        observations = observations.reshape(*shape, self._size)
        return observations.astype(dtype), rewards.reshape(shape).astype(dtype), done.reshape(shape)
