"""The MuJoCo engine behind a callback equals a plain loop of the engine."""

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
from helpers.mujoco_loop import MODEL_NAMES, contact_forces_of_bodies, loop, starts
from helpers.rl_cases import compiled

from maml_jax.parallel import backend
from maml_jax.rl.envs import mujoco as engine_module
from maml_jax.rl.envs.locomotion import contact_forces, planar_centre_of_mass, rotation
from maml_jax.rl.envs.mujoco import MODELS, Engine

stop_clock = engine_module._stop_clock


@pytest.fixture(scope="module")
def engines():
    return {name: Engine(MODELS / f"{name}.xml") for name in MODEL_NAMES}


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_callback_equals_a_loop_of_the_engine_bit_for_bit(x64_everywhere, engines, name):
    engine, rng = engines[name], np.random.default_rng(0)
    motors = engine.sizes[2]
    state = starts(engine, rng, 6)
    controls = rng.uniform(-1, 1, size=(40, 6, motors))

    @compiled
    def simulate(state, controls):  # Two nested maps in a scan call the host once for each time step.
        def step(state, control):
            outputs = jax.vmap(jax.vmap(engine.step))(state, control)
            return outputs.state, outputs

        return jax.lax.scan(step, state, controls)[1]

    outputs = simulate(state.reshape(2, 3, -1), controls.reshape(40, 2, 3, motors))
    states, sensors = (np.asarray(leaf).reshape(40, 6, leaf.shape[-1]) for leaf in outputs)
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
    assert touched  # There were contacts.


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_failed_simulation_does_not_affect_the_others(engines, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # The engine writes warnings to a file.
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
    assert simulated == [3] + [2] * (name == "ant")  # The fourth state failed in the step: no sensors are read.
    assert np.isnan(step(state.at[:].set(jnp.nan), control).state).all() and sum(simulated) == 3 + 2 * (name == "ant")
    for before, after in zip(fine, wrong):
        if after.shape[1]:  # The cheetah has no sensors.
            np.testing.assert_array_equal(np.isnan(after).all(1), [True, True, False, True, False])
        np.testing.assert_array_equal(before[jnp.array([2, 4])], after[jnp.array([2, 4])])
    again = step(state, control)
    for before, after in zip(fine, again):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("cores_of_a_device", [1, 3])
def test_concurrent_calls_are_independent(engines, cores_of_a_device, monkeypatch):
    """There are more calls than devices. Each call uses one thread or three threads."""
    monkeypatch.setattr(backend, "cores", lambda: cores_of_a_device * jax.local_device_count())
    engine, rng = Engine(MODELS / "ant.xml"), np.random.default_rng(0)
    positions, speeds, motors = engine.sizes
    standing = np.concatenate([engine.start, np.zeros(speeds)])
    states = standing + 0.05 * rng.standard_normal((6, 40, positions + speeds))
    controls = rng.uniform(-1, 1, (6, 40, motors))
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(engine._step, states, controls))
    for outputs, state, control in zip(found, states, controls):
        jax.tree.map(np.testing.assert_array_equal, outputs, engines["ant"]._step(state, control))
    workers = [engine._workers.get_nowait() for _ in range(jax.local_device_count())]
    assert engine._workers.empty() and all(len(worker.memory) == cores_of_a_device for worker in workers)


def test_an_error_in_the_first_call_is_raised_by_every_call(monkeypatch):
    def full(model):
        raise MemoryError("no more")

    def call():
        with pytest.raises(MemoryError, match="no more"):
            engine._step(np.zeros((1, 18)), np.zeros((1, 6)))
        raised.append(True)

    engine, raised = Engine(MODELS / "half_cheetah.xml"), []
    monkeypatch.setattr(mujoco, "MjData", full)
    for _ in range(2):  # Call in threads, so that a deadlock does not block the test.
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(60)
    assert raised == [True, True]


def test_a_clock_that_the_user_installed_is_kept(monkeypatch):
    monkeypatch.setattr(engine_module, "_stop_clock", lambda package: pytest.fail("The clock was removed."))
    mujoco.set_mjcb_time(lambda: 7.0)
    try:
        Engine(MODELS / "half_cheetah.xml")
    finally:
        mujoco.set_mjcb_time(None)
        stop_clock(Path(mujoco.__file__).parent)


@pytest.mark.skipif(
    tuple(map(int, mujoco.__version__.split(".")[:2])) < (3, 17), reason="The clock of MuJoCo 3.8 cannot be stopped."
)
def test_the_engine_reads_no_clock(engines):
    """The timers of the engine's profiler stay at zero."""
    model = engines["ant"].model
    data = mujoco.MjData(model)
    mujoco.mj_step(model, data, nstep=100)
    timers = [data.timer[index] for index in range(mujoco.mjtTimer.mjNTIMER)]
    assert max(timer.number for timer in timers) >= 100 and all(timer.duration == 0 for timer in timers)


def test_pictures_show_the_positions():
    """Runs in a new process, because mujoco selects the implementation of OpenGL at import."""
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
