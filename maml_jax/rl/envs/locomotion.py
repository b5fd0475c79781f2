"""Half-cheetah and ant that are to run at a velocity or in a direction they are not told (paper, section 5.3).

Time step, frame skip 1, observations, costs, ends and noise at the start are those of the authors' code; see
`models/*.xml` for the bodies.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax import validation
from maml_jax.rl.environment import Environment, Step
from maml_jax.rl.envs.mjx import MjxEngine
from maml_jax.rl.envs.mujoco import MODELS, Engine

Goal = Literal["velocity", "direction"]
Physics = Literal["mujoco", "mjx"]

CHEETAH_OBSERVATION, ANT_OBSERVATION = 20, 125
"""Numbers in an observation."""
HEIGHTS = (0.2, 1.0)
"""The ant's torso; outside, the episode ends."""


ENGINES: dict[Physics, type[Engine] | type[MjxEngine]] = {"mujoco": Engine, "mjx": MjxEngine}


class Body(NamedTuple):
    """State of an episode: the engine's, and what its sensors tell of it."""

    state: jax.Array
    sensors: jax.Array


def half_cheetah(goal: Goal, horizon: int = 200, physics: Physics = "mujoco") -> Environment:
    """A planar runner with 6 motors; the task is a velocity in m/s from 0 to 2, or a direction, 1 or -1.

    Args:
      goal: what the task is.
      horizon: time steps of an episode.
      physics: 'mujoco', the C engine on the host, or 'mjx', which is for accelerators.

    Raises:
      ValueError: for a goal or physics that do not exist and a horizon below 1.
      ModuleNotFoundError: if the engine is not installed.
      RuntimeError: if MJX is of another version than MuJoCo.
    """
    _check(goal, horizon, physics)
    engine = ENGINES[physics](MODELS / "half_cheetah.xml")
    centre_of_mass = planar_centre_of_mass(engine)
    positions = engine.sizes[0]

    def observe(body: Body, task: jax.Array) -> jax.Array:
        return jnp.concatenate([body.state[1:], centre_of_mass(body.state[:positions])])

    def step(body: Body, action: jax.Array, task: jax.Array) -> Step:
        body = Body(*engine.step(body.state, action))
        moved = jax.jvp(centre_of_mass, (body.state[:positions],), (body.state[positions:],))[1]
        reward = (-jnp.abs(moved[0] - task) if goal == "velocity" else task * moved[0]) - 0.05 * jnp.square(
            action
        ).sum()
        return Step(body, reward, jnp.zeros([], bool))

    return _environment("half-cheetah", goal, (0.0, 2.0), engine, horizon, CHEETAH_OBSERVATION, observe, step)


def ant(goal: Goal, horizon: int = 200, physics: Physics = "mujoco") -> Environment:
    """A four-legged body with 8 motors; the task is a velocity in m/s from 0 to 3, or a direction, 1 or -1.

    Args:
      goal: what the task is.
      horizon: time steps of an episode.
      physics: 'mujoco', the C engine on the host, or 'mjx', which is for accelerators.

    Raises:
      ValueError: for a goal or physics that do not exist and a horizon below 1.
      ModuleNotFoundError: if the engine is not installed.
      RuntimeError: if MJX is of another version than MuJoCo.
    """
    _check(goal, horizon, physics)
    engine = ENGINES[physics](MODELS / "ant.xml")

    def observe(body: Body, task: jax.Array) -> jax.Array:
        centre = body.sensors[:3]
        forces = jnp.clip(contact_forces(body.sensors), -1, 1)
        return jnp.concatenate([body.state, forces.ravel(), rotation(body.state[3:7]).ravel(), centre])

    def fallen(body: Body) -> jax.Array:
        height = body.state[2]
        return (height < HEIGHTS[0]) | (height > HEIGHTS[1])

    def step(body: Body, action: jax.Array, task: jax.Array) -> Step:
        # After its end an episode stays as it is: without a control the engine spends no time on it.
        over = fallen(body)
        moved = Body(*engine.step(body.state, jnp.where(over, jnp.nan, action)))
        body = jax.tree.map(partial(jnp.where, over), body, moved)
        velocity = body.sensors[3]
        progress = 1 - jnp.abs(velocity - task) if goal == "velocity" else task * velocity
        costs = 0.005 * jnp.square(action).sum()
        costs += 0.0005 * jnp.square(jnp.clip(contact_forces(body.sensors), -1, 1)).sum()
        return Step(body, progress - costs + 0.05, fallen(body))

    return _environment("ant", goal, (0.0, 3.0), engine, horizon, ANT_OBSERVATION, observe, step)


def _check(goal: Goal, horizon: int, physics: Physics) -> None:
    validation.one_of("goal", goal, get_args(Goal))
    validation.one_of("physics", physics, get_args(Physics))
    validation.at_least("horizon", horizon, 1)


def _environment(
    name: str,
    goal: Goal,
    velocities: tuple[float, float],
    engine: Engine | MjxEngine,
    horizon: int,
    observation_size: int,
    observe: Callable[[Any, jax.Array], jax.Array],
    step: Callable[[Any, jax.Array, jax.Array], Step],
) -> Environment:
    positions, speeds, motors = engine.sizes

    def sample_tasks(key: jax.Array, count: int) -> jax.Array:
        if goal == "direction":
            return jax.random.rademacher(key, (count,), jnp.result_type(float))
        return jax.random.uniform(key, (count,), minval=velocities[0], maxval=velocities[1])

    def reset(key: jax.Array, task: jax.Array) -> Body:
        noise = jax.random.normal(key, (positions + speeds,))
        scale = np.repeat([0.01, 0.1], [positions, speeds])
        standing = np.concatenate([engine.start, np.zeros(speeds)])
        return Body(*engine.read(jnp.asarray(standing, noise.dtype) + jnp.asarray(scale, noise.dtype) * noise))

    return Environment(
        name=f"{name}-{goal}",
        observation_size=observation_size,
        action_size=motors,
        horizon=horizon,
        sample_tasks=sample_tasks,
        check_tasks=partial(check_tasks, goal, velocities),
        reset=reset,
        observe=observe,
        step=step,
    )


def check_tasks(goal: Goal, velocities: tuple[float, float], tasks: object) -> None:
    """Raises ValueError unless `tasks` is `[T]` of what the goal allows."""
    given = np.asarray(tasks)
    if goal == "direction":
        allowed, fine = "1 or -1", np.isin(given, (-1, 1))
    else:
        allowed, fine = "from {:g} to {:g}".format(*velocities), (given >= velocities[0]) & (given <= velocities[1])
    if given.ndim != 1 or not fine.all():
        raise ValueError(f"The tasks here are numbers [T], each a {goal} {allowed}, but got {given.tolist()}.")


def planar_centre_of_mass(engine: Engine | MjxEngine) -> Callable[[jax.Array], jax.Array]:
    """`positions [nq] -> [3]`, for a tree of bodies that slides along x and z and turns about y, as the cheetah.

    The centre is the root's place and, for each body, a fixed vector turned by the angles on the way to it.
    To ask the engine for it would cost half a step.
    """
    model = engine.model
    weight, below = model.body_mass / model.body_mass.sum(), model.body_mass.copy()
    for body in range(model.nbody - 1, 0, -1):
        below[model.body_parentid[body]] += below[body]
    arms = weight[:, None] * model.body_ipos
    path = np.zeros((model.nbody, model.nq))
    for body in range(1, model.nbody):
        parent = model.body_parentid[body]
        first, count = model.body_jntadr[body], model.body_jntnum[body]
        path[body] = path[parent]
        path[body, first + count - 1] = 1  # Slides come before the one hinge of a body.
        arms[parent] += below[body] / model.body_mass.sum() * model.body_pos[body]

    def centre(position: jax.Array) -> jax.Array:
        x, _, z = jnp.asarray(arms, position.dtype).T
        angles = jnp.asarray(path, position.dtype) @ position
        sine, cosine = jnp.sin(angles), jnp.cos(angles)
        along, up = (cosine * x + sine * z).sum(), (cosine * z - sine * x).sum()
        return jnp.stack([position[0] + along, jnp.zeros_like(along), position[1] + up])

    return centre


def positions(engine: Engine, observation: jax.Array) -> jax.Array:
    """The engine's `qpos` `[nq]` from what `observe` gave, to be rendered."""
    count = engine.sizes[0]
    if observation.size == ANT_OBSERVATION:
        return observation[:count]
    # The cheetah does not see its own x, but its centre of mass.
    standing = jnp.concatenate([jnp.zeros_like(observation[:1]), observation[: count - 1]])
    return standing.at[0].set(observation[-3] - planar_centre_of_mass(engine)(standing)[0])


def contact_forces(sensors: jax.Array) -> jax.Array:
    """The ant's contacts as the classic engine's `cfrc_ext`, `[14, 6]`: torque about the centre of mass, and force.

    One row a part, which were bodies all, the first for the world, which feels none.
    """
    contacts = sensors[6:].reshape(-1, 3, 3)
    force, torque, place = contacts[:, 0], contacts[:, 1], contacts[:, 2]
    rows = jnp.concatenate([torque + jnp.cross(place - sensors[:3], force), force], 1)
    return jnp.concatenate([jnp.zeros_like(rows[:1]), rows])


def rotation(quaternion: jax.Array) -> jax.Array:
    """The matrix `[3, 3]` of a quaternion of any length."""
    w, x, y, z = quaternion / jnp.sqrt(jnp.square(quaternion).sum())
    return jnp.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip
