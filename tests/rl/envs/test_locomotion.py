"""Half-cheetah and ant: contacts, rewards and observations equal those of the engine, and errors."""

import sys

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from helpers.mujoco_loop import MODEL_NAMES, contact_forces_of_bodies, loop

from maml_jax.rl.envs.locomotion import ant, contact_forces, half_cheetah, positions
from maml_jax.rl.envs.mujoco import MODELS, Engine

CLASSIC = {
    "half_cheetah": ((0.4, 0.1, 0.1), (0, 0.8, 0.01), 0),
    "ant": ((1, 0.5, 0.5), (0.8, 0.8, 0.01), 0.01),
}
"""Friction, impedance and margin of every geom in the classic models."""


@pytest.fixture(scope="module")
def engines():
    return {name: Engine(MODELS / f"{name}.xml") for name in MODEL_NAMES}


def test_contact_forces_equal_those_of_the_classic_ant(x64_everywhere):
    """The ant has random positions, some of them partly inside the floor, and random velocities."""
    engine, rng, felt = Engine(MODELS / "ant.xml"), np.random.default_rng(0), np.zeros(14, bool)
    engine._reader.opt.tolerance = 0  # Adjacent geoms share a force, and the shares converge slowly.
    data = mujoco.MjData(engine.model)
    for _ in range(100):
        data.qvel[:] = 5 * rng.normal(size=data.qvel.size)
        data.qpos[:] = engine.start + 0.3 * rng.normal(size=engine.start.size)
        data.qpos[2:7] = rng.uniform(0, 0.4), *rng.normal(size=4)
        data.qpos[3:7] /= np.linalg.norm(data.qpos[3:7])
        state = jnp.concatenate([data.qpos, data.qvel])
        forces = contact_forces(engine.read(state).sensors)
        np.testing.assert_allclose(forces, contact_forces_of_bodies(data, tolerance=0), rtol=1e-8, atol=1e-7)
        felt |= np.asarray(forces != 0).any(1)
    assert felt[1:].all() and not felt[0]


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_listed_contact_pairs_are_complete(name):
    def simulated(model):
        """States of bodies dropped at random angles, and the geoms that touch something."""
        rng, data, states, touching = np.random.default_rng(0), mujoco.MjData(model), [], set()
        for _ in range(12):
            mujoco.mj_resetData(model, data)
            if name == "ant":
                data.qpos[3:7] = rng.normal(size=4)
            else:
                data.qpos[2] = rng.uniform(-np.pi, np.pi)
            for _ in range(80):
                data.ctrl[:] = rng.uniform(-1, 1, size=model.nu)
                mujoco.mj_step(model, data)
                states.append(np.concatenate([data.qpos, data.qvel]))
                touching |= {model.geom(part).name for part in data.contact.geom.ravel()}
        return np.array(states), touching

    spec = mujoco.MjSpec.from_file(str(MODELS / f"{name}.xml"))
    listed, touching = simulated(spec.compile())
    assert {pair.geomname2 for pair in spec.pairs} == {part.name for part in spec.geoms} - {"floor"}
    friction, solimp, margin = CLASSIC[name]
    own = {pair.geomname2: (pair.solref, pair.solimp) for pair in spec.pairs if pair.geomname2.startswith("leg")}
    for pair in list(spec.pairs):
        np.testing.assert_array_equal(pair.friction, np.array(friction)[[0, 0, 1, 2, 2]])
        spec.delete(pair)
    for part in spec.geoms:
        floor = part.name == "floor"
        part.contype, part.conaffinity, part.condim = not floor, floor, 3
        part.friction, part.solref, part.solimp[:3] = friction, (0.02, 1), solimp
        if part.name in own:
            part.priority, (part.solref, part.solimp) = 1, own[part.name]
        # MuJoCo now adds the margins of both geoms. The classic engine took the larger margin.
        part.margin = 0 if floor else margin
    searched, found = simulated(spec.compile())
    assert touching == found and len(found) > len(spec.geoms) / 2
    np.testing.assert_array_equal(listed, searched)


@pytest.mark.parametrize(("make", "goal"), [(half_cheetah, "velocity"), (half_cheetah, "direction"), (ant, "velocity"),
                                            (ant, "direction")])  # fmt: skip
def test_rewards_and_observations_equal_those_of_finn_et_al(x64_everywhere, engines, make, goal):
    environment = make(goal)
    name = make.__name__
    task = jnp.array(-1.0 if goal == "direction" else 0.7)
    body = environment.reset(jax.random.key(0), task)
    action = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, environment.action_size))
    step = environment.step(body, action, task)
    (data,) = loop(name, np.asarray(body.state), [np.asarray(action)])
    velocity = data.subtree_linvel[1][0]
    progress = -velocity if goal == "direction" else -abs(velocity - 0.7)
    observation = [data.qpos[1:], data.qvel, data.subtree_com[1]]
    if name == "half_cheetah":
        expected = progress - 0.05 * np.square(action).sum()
    else:
        forces = np.clip(contact_forces_of_bodies(data), -1, 1)
        expected = progress + (goal == "velocity") - 0.005 * np.square(action).sum() - 0.0005 * np.square(forces).sum()
        expected += 0.05
        observation = [data.qpos, data.qvel, forces.ravel(), data.xmat[1], data.subtree_com[1]]
    np.testing.assert_allclose(step.reward, expected, rtol=1e-9)
    observed = environment.observe(step.state, task)
    assert observed.shape == (environment.observation_size,) and not step.done
    np.testing.assert_allclose(observed, np.concatenate(observation), atol=1e-9)
    np.testing.assert_allclose(positions(engines[name], observed), data.qpos, atol=1e-9)
    if name == "ant":
        for height, speed, ends in ((0.21, -8.0, True), (0.5, -4.0, False), (0.95, 4.0, True)):
            at = body._replace(state=body.state.at[2].set(height).at[engines[name].sizes[0] + 2].set(speed))
            moved = environment.step(at, action, task)
            assert bool(moved.done) == ends and moved.state.state[2] != height
            later = environment.step(moved.state, action, task)
            same = [bool((old == new).all()) for old, new in zip(moved.state, later.state)]
            assert same == [ends, ends] and bool(later.done) == ends  # The state does not change after the end.


def test_the_distribution_of_tasks_and_errors_of_arguments(monkeypatch):
    cheetah, runner = half_cheetah("velocity"), ant("direction")
    velocities = cheetah.sample_tasks(jax.random.key(0), 1000)
    assert velocities.min() < 0.02 and 1.98 < velocities.max() <= 2
    assert set(np.unique(runner.sample_tasks(jax.random.key(0), 100))) == {-1, 1}
    with pytest.raises(ValueError, match="horizon must be an integer of at least 1, but got 0"):
        ant("velocity", horizon=0)
    with pytest.raises(ValueError, match="goal must be one of 'velocity', 'direction', but got 'moon'"):
        half_cheetah("moon")
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'maml-jax\[mujoco\]'"):
        half_cheetah("velocity")
