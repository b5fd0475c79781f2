"""Reference loops in the Python API of MuJoCo."""

import mujoco
import numpy as np

from maml_jax.rl.envs.mjx import mjx_xml
from maml_jax.rl.envs.mujoco import MODELS

MODEL_NAMES = ("half_cheetah", "ant")


def loop(name, state, controls):
    """Steps the engine from a state with a sequence of controls. Yields the data after each step, with all fields
    computed."""
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
    """The contact forces `cfrc_ext` of MJX's ant, where every geom is a body, at the state and control of `data`."""
    model = mujoco.MjModel.from_xml_string(mjx_xml(MODELS / "ant.xml"))
    model.opt.tolerance = tolerance
    copy = mujoco.MjData(model)
    copy.qpos[:], copy.qvel[:], copy.ctrl[:] = data.qpos, data.qvel, data.ctrl
    mujoco.mj_forward(model, copy)
    mujoco.mj_rnePostConstraint(model, copy)
    return copy.cfrc_ext


def starts(engine, rng, count):
    """Random initial states `[count, nq + nv]`."""
    positions, speeds, _ = engine.sizes
    noise = rng.normal(size=(count, positions + speeds)) * np.repeat([0.01, 0.1], [positions, speeds])
    return np.concatenate([engine.start, np.zeros(speeds)]) + noise
