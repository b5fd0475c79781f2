"""Gymnasium environments as an `Environment`.

A Gymnasium environment keeps its state in Python. Every running episode therefore has a simulator on the host. The JAX
state holds the number of the episode, by which the host finds the simulator. The simulators step one after the other.
"""

import inspect
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax import validation
from maml_jax.rl.environment import Environment, Step, checked


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
      make: a function without arguments that makes a `gymnasium.Env`. The action space is a Box with bounds or
        Discrete. `from_gymnasium` calls `make` once, and takes one step. Rollouts call `make` again when more episodes
        run at the same time. A simulator is used again only after its episode has ended.
      set_task: `(env.unwrapped, task) -> None`: sets the task of a simulator, before each reset.
      sample_tasks: `(key, T) -> [T, ...]`: a JAX function that samples tasks.
      horizon: `H`, time steps after which an episode ends. An episode also ends if the simulator returns 'terminated'
        or 'truncated'. `maml_rl(bootstrap=True)` treats the two differently.
      name: the name of the environment.

    Returns:
      The environment. Actions in [-1, 1] are scaled to the bounds of a Box. Discrete actions are one-hot vectors, for
      `maml_jax.rl.policy.categorical_mlp`. Observations are flattened, and discrete observations become one-hot
      vectors. Rewards and ends may be numbers of any type, or arrays of one number. Episodes are reproducible if a
      simulator is deterministic for a given seed. An exception in a simulator ends the program. For float64, set
      jax_enable_x64 with `jax.config.update`, which applies to all threads.

    Raises:
      ModuleNotFoundError: if gymnasium is not installed.
      TypeError: if `make` does not return a `gymnasium.Env`.
      ValueError: for a horizon below 1, for a space that is not supported, for an action space without bounds, or if
        `reset` or `step` of the simulator return values of another form than Gymnasium's, such as the form of gym
        before version 0.26.

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
        import gymnasium
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Gymnasium environments need the package gymnasium: pip install 'maml-jax[gymnasium]', or in a checkout "
            "pip install -e '.[gymnasium]'."
        ) from error
    validation.at_least("horizon", horizon, 1)
    first = make()
    if not isinstance(first, gymnasium.Env):
        raise TypeError(
            f"make must return a gymnasium.Env, but returned {first!r}. For environments of the older package gym, use "
            "the package shimmy."
        )
    simulators = _Simulators(name, make, set_task, first, horizon)
    size = simulators.observation_size

    def reset(key: jax.Array, task: jax.Array) -> EpisodeState:
        dtype = jnp.result_type(float)
        shapes = (jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((size,), dtype))
        seed = jax.random.bits(key, dtype=jnp.uint32)
        start = partial(simulators.reset, dtype)
        ticket, observation = jax.pure_callback(start, shapes, seed, task, vmap_method="broadcast_all")
        return EpisodeState(ticket, jnp.zeros([], jnp.int32), observation)

    def step(state: EpisodeState, action: jax.Array, task: jax.Array) -> Step:
        dtype = state.observation.dtype
        forms = (((size,), dtype), ((), dtype), ((), bool), ((), bool))
        shapes = tuple(jax.ShapeDtypeStruct(*form) for form in forms)
        advance = partial(simulators.step, dtype)
        observation, reward, done, truncated = jax.pure_callback(
            advance, shapes, state.ticket, state.time, action, vmap_method="broadcast_all"
        )
        return Step(EpisodeState(state.ticket, state.time + 1, observation), reward, done, truncated)

    environment = Environment(
        name=name,
        observation_size=size,
        action_size=simulators.action_size,
        horizon=horizon,
        sample_tasks=sample_tasks,
        reset=reset,
        observe=lambda state, task: state.observation,
        step=step,
        discrete=simulators.discrete,
    )
    simulators.try_step(np.asarray(checked(environment).sample_tasks(jax.random.key(0), 1))[0])
    return environment


class _Episode:
    """A running episode: its simulator, and the time steps taken."""

    def __init__(self, env: Any):
        self.env, self.time = env, 0


class _Simulators:
    """The simulators of all running episodes, by the number of the episode (ticket). Simulators are reused."""

    def __init__(self, name: str, make: Any, set_task: Any, first: Any, horizon: int):
        from gymnasium import spaces

        self._name, self._make, self._set_task, self._horizon = name, make, set_task, horizon
        # Observations.
        observations = first.observation_space
        if not observations.is_np_flattenable:
            raise ValueError(f"observation_space must be of a fixed size, but {name!r} has {observations}.")
        self.observation_size = spaces.flatdim(observations)
        self._flatten = np.ravel if isinstance(observations, spaces.Box) else partial(spaces.flatten, observations)
        # Actions.
        self._space: Any = first.action_space
        self.discrete = isinstance(self._space, spaces.Discrete)
        if not self.discrete:
            if not isinstance(self._space, spaces.Box):
                raise ValueError(f"action_space must be a Box or Discrete, but {name!r} has {self._space}.")
            if not np.isfinite([self._space.low, self._space.high]).all():
                raise ValueError(f"action_space must have finite bounds, but {name!r} has {self._space}.")
        self.action_size = spaces.flatdim(self._space)
        # Simulators.
        self._idle = [first]
        self._running: dict[int, _Episode] = {}
        self._tickets = 0
        self._lock = threading.Lock()  # Several devices call at the same time.

    def try_step(self, task: np.ndarray) -> None:
        """Takes one step, to raise errors of the simulator before the training.

        Raises:
          ValueError: if the simulator has not the interface of Gymnasium.
        """
        (env,) = self._idle
        parameters = inspect.signature(env.unwrapped.reset).parameters.values()
        if not any(each.name == "seed" or each.kind is each.VAR_KEYWORD for each in parameters):
            raise ValueError(f"reset of {self._name!r} must take the argument seed, as Gymnasium's does.")
        self._start(env, 0, task)
        self._advance(env, np.zeros(self.action_size))

    def reset(self, dtype: Any, seeds: Any, tasks: Any) -> tuple[np.ndarray, np.ndarray]:
        seeds = np.asarray(seeds)
        rows = np.asarray(tasks).reshape(seeds.size, *np.shape(tasks)[seeds.ndim :])
        tickets, observations = np.zeros(seeds.size, np.int32), np.zeros((seeds.size, self.observation_size))
        with self._lock:
            for row, (seed, task) in enumerate(zip(seeds.ravel(), rows)):
                env = self._idle.pop() if self._idle else self._make()
                observations[row] = self._start(env, int(seed), task)
                self._tickets = (self._tickets + 1) % (1 << 31)
                tickets[row] = self._tickets
                self._running[self._tickets] = _Episode(env)
        return tickets.reshape(seeds.shape), observations.reshape(*seeds.shape, self.observation_size).astype(dtype)

    def step(
        self, dtype: Any, tickets: Any, times: Any, actions: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        tickets, times = np.asarray(tickets), np.asarray(times)
        actions = np.asarray(actions).reshape(tickets.size, -1)
        observations, rewards = np.full((tickets.size, self.observation_size), np.nan), np.full(tickets.size, np.nan)
        done, truncated = np.zeros((2, tickets.size), bool)
        with self._lock:
            for row, (ticket, time) in enumerate(zip(tickets.ravel().tolist(), times.ravel().tolist())):
                episode = self._running.get(ticket)
                # The episode has ended, so nothing uses this row. NaN reveals an error.
                if episode is None:
                    continue
                if episode.time != time:  # JAX ended the episode, because a value was not finite.
                    self._idle.append(self._running.pop(ticket).env)
                    continue
                observations[row], rewards[row], terminated, cut = self._advance(episode.env, actions[row])
                done[row], truncated[row] = terminated or cut, cut and not terminated
                episode.time += 1
                if done[row] or episode.time == self._horizon:
                    self._idle.append(self._running.pop(ticket).env)
        shape = tickets.shape
        observations = observations.reshape(*shape, self.observation_size)
        flags = done.reshape(shape), truncated.reshape(shape)
        return observations.astype(dtype), rewards.reshape(shape).astype(dtype), *flags

    def _start(self, env: Any, seed: int, task: np.ndarray) -> np.ndarray:
        """Resets a simulator, and returns the observation."""
        self._set_task(env.unwrapped, task)
        returned = env.reset(seed=seed)
        if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict)):
            raise self._error("reset", "(observation, info)", returned)
        return self._observation("reset", returned[0])

    def _advance(self, env: Any, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        """Takes one step with an action `[A]`; returns observation, reward, 'terminated' and 'truncated'."""
        if self.discrete:
            returned = env.step(self._space.start + action.argmax())
        else:
            low, high = self._space.low, self._space.high
            scaled = low + (action.reshape(low.shape) + 1) / 2 * (high - low)
            whole = np.issubdtype(self._space.dtype, np.integer)
            returned = env.step((np.rint(scaled) if whole else scaled).astype(self._space.dtype))
        if not (isinstance(returned, tuple) and len(returned) == 5):
            raise self._error("step", "(observation, reward, terminated, truncated, info)", returned)
        observation, *numbers, _ = returned
        reward, terminated, truncated = map(self._number, ("reward", "terminated", "truncated"), numbers)
        return self._observation("step", observation), reward, bool(terminated), bool(truncated)

    def _observation(self, method: str, value: Any) -> np.ndarray:
        observation = np.asarray(self._flatten(value))
        if observation.dtype.kind not in "biuf" or observation.size != self.observation_size:
            raise self._error(method, f"an observation of {self.observation_size} numbers", value)
        return observation

    def _number(self, name: str, value: Any) -> float:
        number = np.asarray(value)
        if number.dtype.kind not in "biuf" or number.size != 1:
            raise self._error("step", f"one number as {name}", value)
        return number.item()

    def _error(self, method: str, expected: str, value: Any) -> ValueError:
        if isinstance(value, tuple):
            given = f"a tuple of {len(value)} values"
        elif isinstance(value, np.ndarray):
            given = f"an array of shape {value.shape} and type {value.dtype}"
        else:
            given = f"{value!r} of type {type(value).__name__}"
        return ValueError(f"{method} of {self._name!r} must return {expected}, but returned {given}.")
