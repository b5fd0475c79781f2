"""Half-cheetah and ant that run at a goal velocity or in a goal direction (Finn et al. 2017, section 5.3).

The task is the goal. The policy does not observe the goal. Time step, frame skip of 1, observations, costs, ends of
episodes and noise of initial states are those of the code of Finn et al. The bodies are in `models/*.xml`.
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
"""Number of entries of an observation, `O`."""
HEIGHTS = (0.2, 1.0)
"""Range of the height of the ant's torso, in m. An episode ends outside this range."""


ENGINES: dict[Physics, type[Engine] | type[MjxEngine]] = {"mujoco": Engine, "mjx": MjxEngine}
"""Engines by the name of the physics."""


class Body(NamedTuple):
    """The JAX state of an episode."""

    state: jax.Array
    """`[nq + nv]`: positions and velocities of the engine."""
    sensors: jax.Array
    """`[sensors]`: the sensors of the engine at this state."""


def half_cheetah(goal: Goal, horizon: int = 200, physics: Physics = "mujoco") -> Environment:
    """Half-cheetah, a planar body with 6 motors. A task is a velocity in m/s from 0 to 2, or a direction, 1 or -1.

    Args:
      goal: the kind of task, 'velocity' or 'direction'.
      horizon: `H`, time steps of an episode, each of 0.01 s.
      physics: 'mujoco' for the C engine on the host, or 'mjx' for MJX on accelerators.

    Returns:
      An environment with tasks `[]`, actions `[6]` and observations `[20]`: positions without x, velocities, and the
      centre of mass.

    Raises:
      ValueError: for an unknown goal, for unknown physics, or for a horizon below 1.
      ModuleNotFoundError: if the engine is not installed.
      RuntimeError: if the versions of MJX and MuJoCo differ.

    References:
      Finn, Abbeel and Levine 2017, arXiv:1703.03400, section 5.3 and appendix A.2.
    """
    _check(goal, horizon, physics)
    engine = ENGINES[physics](MODELS / "half_cheetah.xml")
    centre_of_mass = planar_centre_of_mass(engine)
    positions = engine.sizes[0]

    def observe(body: Body, task: jax.Array) -> jax.Array:
        return jnp.concatenate([body.state[1:], centre_of_mass(body.state[:positions])])

    def step(body: Body, action: jax.Array, task: jax.Array) -> Step:
        body = Body(*engine.step(body.state, action))
        velocity = jax.jvp(centre_of_mass, (body.state[:positions],), (body.state[positions:],))[1][0]
        progress = -jnp.abs(velocity - task) if goal == "velocity" else task * velocity
        return Step(body, progress - 0.05 * jnp.square(action).sum(), jnp.zeros([], bool))

    return _environment("half-cheetah", goal, (0.0, 2.0), engine, horizon, CHEETAH_OBSERVATION, observe, step)


def ant(goal: Goal, horizon: int = 200, physics: Physics = "mujoco") -> Environment:
    """Ant, a four-legged body with 8 motors. A task is a velocity in m/s from 0 to 3, or a direction, 1 or -1.

    Args:
      goal: the kind of task, 'velocity' or 'direction'.
      horizon: `H`, time steps of an episode, each of 0.02 s.
      physics: 'mujoco' for the C engine on the host, or 'mjx' for MJX on accelerators.

    Returns:
      An environment with tasks `[]`, actions `[8]` and observations `[125]`: positions, velocities, contact forces, the
      rotation matrix of the torso, and the centre of mass.

    Raises:
      ValueError: for an unknown goal, for unknown physics, or for a horizon below 1.
      ModuleNotFoundError: if the engine is not installed.
      RuntimeError: if the versions of MJX and MuJoCo differ.

    References:
      Finn, Abbeel and Levine 2017, arXiv:1703.03400, section 5.3 and appendix A.2.
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
        # The state does not change after the end of an episode. With a NaN control the engine skips the simulation.
        ended = fallen(body)
        moved = Body(*engine.step(body.state, jnp.where(ended, jnp.nan, action)))
        body = jax.tree.map(partial(jnp.where, ended), body, moved)
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
    goal_velocities: tuple[float, float],
    engine: Engine | MjxEngine,
    horizon: int,
    observation_size: int,
    observe: Callable[[Any, jax.Array], jax.Array],
    step: Callable[[Any, jax.Array, jax.Array], Step],
) -> Environment:
    positions, velocities, motors = engine.sizes

    def sample_tasks(key: jax.Array, count: int) -> jax.Array:
        if goal == "direction":
            return jax.random.rademacher(key, (count,), jnp.result_type(float))
        return jax.random.uniform(key, (count,), minval=goal_velocities[0], maxval=goal_velocities[1])

    def reset(key: jax.Array, task: jax.Array) -> Body:
        noise = jax.random.normal(key, (positions + velocities,))
        scale = np.repeat([0.01, 0.1], [positions, velocities])
        standing = np.concatenate([engine.start, np.zeros(velocities)])
        return Body(*engine.read(jnp.asarray(standing, noise.dtype) + jnp.asarray(scale, noise.dtype) * noise))

    return Environment(
        name=f"{name}-{goal}",
        observation_size=observation_size,
        action_size=motors,
        horizon=horizon,
        sample_tasks=sample_tasks,
        reset=reset,
        observe=observe,
        step=step,
    )


def planar_centre_of_mass(engine: Engine | MjxEngine) -> Callable[[jax.Array], jax.Array]:
    """Returns the centre of mass as a function `positions [nq] -> [3]`, in m, for a model that moves in the plane.

    The root of the model slides along x and z, and all joints rotate about y, as in the half-cheetah. The centre is the
    position of the root, plus a fixed vector for each body. The vector of a body is rotated by the sum of the angles on
    the path from the root to the body. Reading the centre from the engine would take half as long as a time step.
    """
    model = engine.model
    # The mass of each body with all bodies below it.
    weight, subtree_mass = model.body_mass / model.body_mass.sum(), model.body_mass.copy()
    for body in range(model.nbody - 1, 0, -1):
        subtree_mass[model.body_parentid[body]] += subtree_mass[body]
    # The fixed vector of each body, and the joints on the path to the body.
    arms = weight[:, None] * model.body_ipos
    path = np.zeros((model.nbody, model.nq))
    for body in range(1, model.nbody):
        parent = model.body_parentid[body]
        first, count = model.body_jntadr[body], model.body_jntnum[body]
        path[body] = path[parent]
        path[body, first + count - 1] = 1  # The hinge of a body is its last joint, after the slides.
        arms[parent] += subtree_mass[body] / model.body_mass.sum() * model.body_pos[body]

    def centre(position: jax.Array) -> jax.Array:
        x, _, z = jnp.asarray(arms, position.dtype).T
        angles = jnp.asarray(path, position.dtype) @ position
        sine, cosine = jnp.sin(angles), jnp.cos(angles)
        along, up = (cosine * x + sine * z).sum(), (cosine * z - sine * x).sum()
        return jnp.stack([position[0] + along, jnp.zeros_like(along), position[1] + up])

    return centre


def positions(engine: Engine, observation: jax.Array) -> jax.Array:
    """Returns the positions of the engine, `[nq]`, from an observation `[O]`, for rendering."""
    count = engine.sizes[0]
    if observation.size == ANT_OBSERVATION:
        return observation[:count]
    # An observation of the half-cheetah has the x of the centre of mass, but not the x of the root.
    standing = jnp.concatenate([jnp.zeros_like(observation[:1]), observation[: count - 1]])
    return standing.at[0].set(observation[-3] - planar_centre_of_mass(engine)(standing)[0])


def contact_forces(sensors: jax.Array) -> jax.Array:
    """Returns the contact forces of the ant as `MjData.cfrc_ext` of the classic ant model, where each geom is a body.

    Args:
      sensors: `[sensors]`, the sensors of `models/ant.xml`.

    Returns:
      `[14, 6]`: torque about the centre of mass in N m, and force in N. There is one row for each geom, and a first row
      of zeros for the world.
    """
    contacts = sensors[6:].reshape(-1, 3, 3)
    force, torque, place = contacts[:, 0], contacts[:, 1], contacts[:, 2]
    rows = jnp.concatenate([torque + jnp.cross(place - sensors[:3], force), force], 1)
    return jnp.concatenate([jnp.zeros_like(rows[:1]), rows])


def rotation(quaternion: jax.Array) -> jax.Array:
    """Returns the rotation matrix `[3, 3]` of a quaternion `[4]` of any length."""
    w, x, y, z = quaternion / jnp.sqrt(jnp.square(quaternion).sum())
    return jnp.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip
