"""Environments of Gymnasium, whose tasks a function of one's own sets, as an `Environment`.

They keep their state in Python, so every episode has a simulator of its own on the host, and the state that JAX sees is
its ticket. That is as slow as the simulators are, one step of one after the other; it needs no change to them.
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


class Seen(NamedTuple):
    """The state of an episode, as far as JAX knows it."""

    ticket: Any
    """int32: which simulator."""
    time: Any
    """int32: steps that it has taken."""
    observation: Any
    """`[O]`."""


def from_gymnasium(
    make: Callable[[], Any],
    set_task: Callable[[Any, np.ndarray], None],
    sample_tasks: Callable[[jax.Array, int], jax.Array],
    *,
    horizon: int,
    check_tasks: Callable[[Any], None] = lambda tasks: None,
    name: str = "gymnasium",
) -> Environment:
    """An `Environment` of simulators that `make` gives.

    Args:
      make: a new `gymnasium.Env`, with Box spaces; called as often as episodes run at a time, and once here.
      set_task: `(env, task)`, called before each reset, sets the task of what is unwrapped from `env`.
      sample_tasks: `(key, T) -> [T, ...]`, a JAX function.
      horizon: time steps after which an episode ends, as it does where the simulator says 'terminated' or 'truncated'.
      check_tasks: raises ValueError for tasks that are not of the family.
      name: what it is called.

    Returns:
      The environment. An action within [-1, 1] is stretched to the bounds of the action space, observations are made
      flat. Episodes follow from the keys as far as the simulators follow from their seeds. An error that a simulator
      raises ends the program with it. Float64 needs jax_enable_x64 to be set for all threads.

    Raises:
      ModuleNotFoundError: if gymnasium is not installed, saying how to install it.
      ValueError: for a horizon below 1, spaces that are no boxes, and actions without bounds.
    """
    try:
        from gymnasium.spaces import Box
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Environments of Gymnasium need it: pip install 'maml-jax[gymnasium]', or in a checkout "
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

    def reset(key: jax.Array, task: jax.Array) -> Seen:
        dtype = jnp.result_type(float)
        shapes = (jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((size,), dtype))
        seed = jax.random.bits(key, dtype=jnp.uint32)
        started = partial(simulators.reset, dtype)
        ticket, seen = jax.pure_callback(started, shapes, seed, task, vmap_method="broadcast_all")
        return Seen(ticket, jnp.zeros([], jnp.int32), seen)

    def step(state: Seen, action: jax.Array, task: jax.Array) -> Step:
        dtype = state.observation.dtype
        shapes = tuple(jax.ShapeDtypeStruct(*of) for of in (((size,), dtype), ((), dtype), ((), bool)))
        stepped = partial(simulators.step, dtype)
        seen, reward, done = jax.pure_callback(
            stepped, shapes, state.ticket, state.time, action, vmap_method="broadcast_all"
        )
        return Step(Seen(state.ticket, state.time + 1, seen), reward, done)

    return Environment(
        name=name,
        observation_size=size,
        action_size=int(np.prod(first.action_space.shape)),
        horizon=horizon,
        sample_tasks=sample_tasks,
        check_tasks=check_tasks,
        reset=reset,
        observe=lambda state, task: state.observation,
        step=step,
    )


class _Episode:
    """A simulator at work."""

    def __init__(self, env: Any):
        self.env, self.time = env, 0


class _Simulators:
    """Simulators by ticket. One whose episode is over is used again."""

    def __init__(self, make: Any, set_task: Any, first: Any, horizon: int, size: int):
        self._make, self._set_task, self._horizon, self._size = make, set_task, horizon, size
        self._space = first.action_space
        self._idle = [first]
        self._at_work: dict[int, _Episode] = {}
        self._tickets = 0
        self._lock = threading.Lock()  # Devices call at the same time.

    def reset(self, dtype: Any, seeds: Any, tasks: Any) -> tuple[np.ndarray, np.ndarray]:
        seeds = np.asarray(seeds)
        rows = np.asarray(tasks).reshape(seeds.size, *np.shape(tasks)[seeds.ndim :])
        tickets, seen = np.zeros(seeds.size, np.int32), np.zeros((seeds.size, self._size))
        with self._lock:
            for row, (seed, task) in enumerate(zip(seeds.ravel(), rows)):
                env = self._idle.pop() if self._idle else self._make()
                self._set_task(env.unwrapped, task)
                observation, _ = env.reset(seed=int(seed))
                self._tickets = (self._tickets + 1) % (1 << 31)
                tickets[row], seen[row] = self._tickets, np.ravel(observation)
                self._at_work[self._tickets] = _Episode(env)
        return tickets.reshape(seeds.shape), seen.reshape(*seeds.shape, self._size).astype(dtype)

    def step(self, dtype: Any, tickets: Any, times: Any, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tickets, times = np.asarray(tickets), np.asarray(times)
        actions = np.asarray(actions).reshape(tickets.size, -1)
        seen, rewards = np.full((tickets.size, self._size), np.nan), np.full(tickets.size, np.nan)
        done = np.zeros(tickets.size, bool)
        with self._lock:
            for row, (ticket, time) in enumerate(zip(tickets.ravel().tolist(), times.ravel().tolist())):
                episode = self._at_work.get(ticket)
                # The steps of an episode that has ended count for nothing; NaN shows if one ever did.
                if episode is None:
                    continue
                if episode.time != time:  # It was ended by what was not finite.
                    self._idle.append(self._at_work.pop(ticket).env)
                    continue
                low, high = self._space.low, self._space.high
                action = low + (actions[row].reshape(low.shape) + 1) / 2 * (high - low)
                observation, reward, terminated, truncated, _ = episode.env.step(action.astype(self._space.dtype))
                seen[row], rewards[row], done[row] = np.ravel(observation), reward, terminated or truncated
                episode.time += 1
                if done[row] or episode.time == self._horizon:
                    self._idle.append(self._at_work.pop(ticket).env)
        shape = tickets.shape
        seen = seen.reshape(*shape, self._size)
        return seen.astype(dtype), rewards.reshape(shape).astype(dtype), done.reshape(shape)
