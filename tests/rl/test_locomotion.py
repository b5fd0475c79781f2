"""Half-cheetah and ant against MuJoCo's own loop."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from helpers.rl_cases import compiled

from maml_jax.parallel import backend
from maml_jax.rl.envs import mujoco as engine_file
from maml_jax.rl.envs.locomotion import ant, contact_forces, half_cheetah, planar_centre_of_mass, positions, rotation
from maml_jax.rl.envs.mjx import as_mjx_takes_it
from maml_jax.rl.envs.mujoco import MODELS, Engine
from maml_jax.rl.meta_rl import given_trials

NAMES = ("half_cheetah", "ant")
engine_file_stop = engine_file._stop_clock
CLASSIC = {
    "half_cheetah": ((0.4, 0.1, 0.1), (0, 0.8, 0.01), 0),
    "ant": ((1, 0.5, 0.5), (0.8, 0.8, 0.01), 0.01),
}
"""Friction, impedance and margin of every part in the classic models."""


@pytest.fixture(scope="module")
def engines():
    return {name: Engine(MODELS / f"{name}.xml") for name in NAMES}


def loop(name, state, controls):
    """One episode in a plain loop of the engine: the data after each step, with everything computed there."""
    model = mujoco.MjModel.from_xml_path(str(MODELS / f"{name}.xml"))
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:] = state[: model.nq], state[model.nq :]
    for control in controls:
        data.ctrl[:] = control
        mujoco.mj_step(model, data)
        mujoco.mj_forward(model, data)
        mujoco.mj_subtreeVel(model, data)
        yield data


def contact_forces_of_bodies(data, tolerance=1e-8):
    """The ant's `cfrc_ext` at the state and control of `data`, of the classic model, where every part is a body."""
    model = mujoco.MjModel.from_xml_string(as_mjx_takes_it(MODELS / "ant.xml"))
    model.opt.tolerance = tolerance
    apart = mujoco.MjData(model)
    apart.qpos[:], apart.qvel[:], apart.ctrl[:] = data.qpos, data.qvel, data.ctrl
    mujoco.mj_forward(model, apart)
    mujoco.mj_rnePostConstraint(model, apart)
    return apart.cfrc_ext


def starts(engine, rng, count):
    positions, speeds, _ = engine.sizes
    noise = rng.normal(size=(count, positions + speeds)) * np.repeat([0.01, 0.1], [positions, speeds])
    return np.concatenate([engine.start, np.zeros(speeds)]) + noise


@pytest.mark.parametrize("name", NAMES)
def test_the_callback_is_the_engines_own_loop_bit_for_bit(x64_everywhere, engines, name):
    engine, rng = engines[name], np.random.default_rng(0)
    motors = engine.sizes[2]
    state = starts(engine, rng, 6)
    controls = rng.uniform(-1, 1, size=(40, 6, motors))

    @compiled
    def simulate(state, controls):  # Two nested maps inside a scan: one call to the host for each time step.
        def step(state, control):
            seen = jax.vmap(jax.vmap(engine.step))(state, control)
            return seen.state, seen

        return jax.lax.scan(step, state, controls)[1]

    seen = simulate(state.reshape(2, 3, -1), controls.reshape(40, 2, 3, motors))
    states, sensors = (np.asarray(leaf).reshape(40, 6, leaf.shape[-1]) for leaf in seen)
    touched = 0
    for episode in range(6):
        for time, data in enumerate(loop(name, state[episode], controls[:, episode])):
            np.testing.assert_array_equal(states[time, episode], np.concatenate([data.qpos, data.qvel]))
            np.testing.assert_array_equal(sensors[time, episode], data.sensordata)
        if name == "ant":
            forces = contact_forces(jnp.asarray(sensors[-1, episode]))
            np.testing.assert_allclose(forces, contact_forces_of_bodies(data), atol=1e-9)
            np.testing.assert_allclose(rotation(jnp.asarray(data.qpos[3:7])), data.xmat[1].reshape(3, 3), atol=1e-12)
            touched += (forces != 0).any()
        else:
            centre = planar_centre_of_mass(engine)
            found, moved = jax.jvp(centre, (jnp.asarray(data.qpos),), (jnp.asarray(data.qvel),))
            np.testing.assert_allclose(found, data.subtree_com[1], atol=1e-12)
            np.testing.assert_allclose(moved, data.subtree_linvel[1], atol=1e-12)
            touched += data.ncon
    assert touched  # The comparison had contacts in it.


def test_each_part_of_the_ant_feels_its_own_contacts(x64_everywhere):
    """In any position, sunk into the floor, and moving."""
    engine, rng, felt = Engine(MODELS / "ant.xml"), np.random.default_rng(0), np.zeros(14, bool)
    engine._reader.opt.tolerance = 0  # What parts in a row share of a force is settled last.
    data = mujoco.MjData(engine.model)
    for _ in range(100):
        data.qvel[:] = 5 * rng.normal(size=data.qvel.size)
        data.qpos[:] = engine.start + 0.3 * rng.normal(size=engine.start.size)
        data.qpos[2:7] = rng.uniform(0, 0.4), *rng.normal(size=4)
        data.qpos[3:7] /= np.linalg.norm(data.qpos[3:7])
        state, still = np.concatenate([data.qpos, data.qvel])[None], np.zeros((1, engine.model.nu))
        forces = contact_forces(jnp.asarray(engine._read(state, still).sensors[0]))
        np.testing.assert_allclose(forces, contact_forces_of_bodies(data, tolerance=0), rtol=1e-8, atol=1e-7)
        felt |= np.asarray(forces != 0).any(1)
    assert felt[1:].all() and not felt[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_listed_contacts_are_those_that_a_search_finds(name):
    def simulated(model):
        """States of bodies dropped at any angle, and the parts that touch something on the way."""
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
        part.margin = 0 if floor else margin  # Today's engine adds the two, the classic one took the larger.
    searched, found = simulated(spec.compile())
    assert touching == found and len(found) > len(spec.geoms) / 2
    np.testing.assert_array_equal(listed, searched)


@pytest.mark.parametrize("name", NAMES)
def test_what_goes_wrong_stays_where_it_is(engines, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # The engine writes its warnings to a file.
    engine = engines[name]
    state = jnp.asarray(starts(engine, np.random.default_rng(0), 5), jnp.float32)
    control = jnp.zeros((5, engine.sizes[2]))
    step = jax.jit(jax.vmap(engine.step))
    fine = step(state, control)
    simulated, simulate = [], engine._simulate
    monkeypatch.setattr(
        engine,
        "_simulate",
        lambda model, state, control: simulated.append(len(state)) or simulate(model, state, control),
    )
    wrong = step(state.at[1, 4].set(jnp.nan).at[3, -1].set(1e18), control.at[0, 2].set(jnp.nan))
    jax.block_until_ready(wrong)
    assert simulated == [3] + [2] * (name == "ant")  # The fourth went wrong on the way, and has no sensors to be read.
    assert np.isnan(step(state.at[:].set(jnp.nan), control).state).all() and sum(simulated) == 3 + 2 * (name == "ant")
    for before, after in zip(fine, wrong):
        if after.shape[1]:  # The cheetah has no sensors.
            np.testing.assert_array_equal(np.isnan(after).all(1), [True, True, False, True, False])
        np.testing.assert_array_equal(before[jnp.array([2, 4])], after[jnp.array([2, 4])])
    again = step(state, control)
    for before, after in zip(fine, again):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(("make", "goal"), [(half_cheetah, "velocity"), (half_cheetah, "direction"), (ant, "velocity"),
                                            (ant, "direction")])  # fmt: skip
def test_rewards_and_observations_are_the_papers(x64_everywhere, engines, make, goal):
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
    seen = environment.observe(step.state, task)
    assert seen.shape == (environment.observation_size,) and not step.done
    np.testing.assert_allclose(seen, np.concatenate(observation), atol=1e-9)
    np.testing.assert_allclose(positions(engines[name], seen), data.qpos, atol=1e-9)
    if name == "ant":
        for height, speed, ends in ((0.21, -8.0, True), (0.5, -4.0, False), (0.95, 4.0, True)):
            at = body._replace(state=body.state.at[2].set(height).at[engines[name].sizes[0] + 2].set(speed))
            moved = environment.step(at, action, task)
            assert bool(moved.done) == ends and moved.state.state[2] != height
            later = environment.step(moved.state, action, task)
            same = [bool((old == new).all()) for old, new in zip(moved.state, later.state)]
            assert same == [ends, ends] and bool(later.done) == ends  # After its end an episode stays.


@pytest.mark.parametrize("cores_of_a_device", [1, 3])
def test_calls_at_once_do_not_meet(engines, cores_of_a_device, monkeypatch):
    """More of them than there are devices, each on one thread or on several."""
    monkeypatch.setattr(backend, "cores", lambda: cores_of_a_device * jax.local_device_count())
    engine, rng = Engine(MODELS / "ant.xml"), np.random.default_rng(0)
    positions, speeds, motors = engine.sizes
    standing = np.concatenate([engine.start, np.zeros(speeds)])
    states = standing + 0.05 * rng.standard_normal((6, 40, positions + speeds))
    controls = rng.uniform(-1, 1, (6, 40, motors))
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(engine._step, states, controls))
    for seen, state, control in zip(found, states, controls):
        jax.tree.map(np.testing.assert_array_equal, seen, engines["ant"]._step(state, control))
    workers = [engine._workers.get_nowait() for _ in range(jax.local_device_count())]
    assert engine._workers.empty() and all(len(worker.memory) == cores_of_a_device for worker in workers)


def test_what_fails_while_an_engine_begins_is_told_each_time(monkeypatch):
    def full(model):
        raise MemoryError("no more")

    def begin():
        with pytest.raises(MemoryError, match="no more"):
            engine._step(np.zeros((1, 18)), np.zeros((1, 6)))
        told.append(True)

    engine, told = Engine(MODELS / "half_cheetah.xml"), []
    monkeypatch.setattr(mujoco, "MjData", full)
    for _ in range(2):  # In threads, as one that waits for ever is to end the test, too.
        thread = threading.Thread(target=begin, daemon=True)
        thread.start()
        thread.join(60)
    assert told == [True, True]


def test_a_clock_of_the_users_stays(monkeypatch):
    monkeypatch.setattr(engine_file, "_stop_clock", lambda package: pytest.fail("It was taken."))
    mujoco.set_mjcb_time(lambda: 7.0)
    try:
        Engine(MODELS / "half_cheetah.xml")
    finally:
        mujoco.set_mjcb_time(None)
        engine_file_stop(Path(mujoco.__file__).parent)


@pytest.mark.skipif(
    tuple(map(int, mujoco.__version__.split(".")[:2])) < (3, 17), reason="3.8 has a clock that nothing stops."
)
def test_the_engine_does_not_look_at_the_clock(engines):
    """Which its own profile tells."""
    model = engines["ant"].model
    data = mujoco.MjData(model)
    mujoco.mj_step(model, data, nstep=100)
    timers = [data.timer[index] for index in range(mujoco.mjtTimer.mjNTIMER)]
    assert max(timer.number for timer in timers) >= 100 and all(timer.duration == 0 for timer in timers)


def test_pictures_show_the_pose():
    """In a process of its own: the engine chooses its OpenGL when it is imported."""
    code = (
        "import numpy as np; from maml_jax.rl.envs.mujoco import MODELS, Engine\n"
        "engine = Engine(MODELS / 'half_cheetah.xml'); lifted = engine.start + np.eye(9)[1]\n"
        "standing, flying, again = engine.pictures(np.stack([engine.start, lifted, engine.start]), 60, 80)\n"
        "assert (standing == again).all() and standing.shape == (60, 80, 3)\n"
        "assert (standing != flying).any(-1).mean() > 0.02"
    )
    environment = {"MUJOCO_GL": "egl", **os.environ}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if "Rendering found no OpenGL" in ended.stderr:
        pytest.skip("This machine has no OpenGL.")
    assert ended.returncode == 0, ended.stderr


def test_tasks_missing_engine_and_horizon_are_told(monkeypatch):
    cheetah, runner = half_cheetah("velocity"), ant("direction")
    velocities = cheetah.sample_tasks(jax.random.key(0), 1000)
    assert velocities.min() < 0.02 and 1.98 < velocities.max() <= 2
    assert set(np.unique(runner.sample_tasks(jax.random.key(0), 100))) == {-1, 1}
    with pytest.raises(ValueError, match=r"each a velocity from 0 to 2, but got \[2\.5\]"):
        given_trials(cheetah, jax.random.key(0), [2.5])
    with pytest.raises(ValueError, match=r"each a direction 1 or -1, but got \[0\.5\]"):
        given_trials(runner, jax.random.key(0), [0.5])
    with pytest.raises(ValueError, match="horizon must be an integer of at least 1, but got 0"):
        ant("velocity", horizon=0)
    with pytest.raises(ValueError, match="goal must be one of 'velocity', 'direction', but got 'moon'"):
        half_cheetah("moon")
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'maml-jax\[mujoco\]'"):
        half_cheetah("velocity")
