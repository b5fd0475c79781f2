"""Environments in MJX equal environments in MuJoCo's C engine."""

import sys

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from helpers.rl_cases import compiled

from maml_jax.rl.envs.locomotion import ant, contact_forces, half_cheetah
from maml_jax.rl.envs.mujoco import MODELS

STEEP = 0.8
"""Cosine between a capsule and the vertical. MJX rotates the friction pyramid above 0.87."""


def random_walks(environment, episodes, steps):
    """States and random actions of episodes in the C engine, `[episodes * steps, ...]`."""
    task = jnp.array(1.0)
    start = jax.vmap(environment.reset, (0, None))(jax.random.split(jax.random.key(0), episodes), task)
    actions = jax.random.uniform(jax.random.key(1), (steps, episodes, environment.action_size), minval=-1.5, maxval=1.5)

    def advance(body, action):
        return jax.vmap(environment.step, (0, 0, None))(body, action, task).state, body

    walked = jax.lax.scan(advance, start, actions)[1]
    return jax.tree.map(lambda leaf: leaf.reshape(steps * episodes, leaf.shape[-1]), (walked, actions))


def steep_and_low(states):
    """Whether a capsule near the floor is steep, for each state of the ant."""
    model = mujoco.MjModel.from_xml_path(str(MODELS / "ant.xml"))
    data, found = mujoco.MjData(model), []
    for state in states:
        data.qpos[:], data.qvel[:] = np.split(state, [model.nq])
        mujoco.mj_forward(model, data)
        capsules = model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE
        axes = data.geom_xmat[:, [2, 5, 8]]
        lowest = data.geom_xpos[:, 2] - np.abs(axes[:, 2]) * model.geom_size[:, 1] - model.geom_size[:, 0]
        found.append((capsules & (np.abs(axes[:, 2]) > STEEP) & (lowest < 0.05)).any())
    return np.array(found)


@pytest.mark.parametrize("make", [half_cheetah, ant])
def test_mjx_equals_the_c_engine(x64_everywhere, make):
    in_c, in_mjx = make("velocity"), make("velocity", physics="mjx")
    bodies, actions = jax.jit(random_walks, static_argnums=(0, 1, 2))(in_c, 8, 40)
    actions = actions.at[0, 0].set(jnp.nan)
    state = bodies.state.at[1, 3].set(jnp.nan).at[2, -1].set(1e18)  # Larger than the largest value of the engine.
    bodies, task = bodies._replace(state=state), jnp.array(1.0)

    def run(environment):
        def start_and_step(bodies, actions):
            start = environment.observe(environment.reset(jax.random.key(3), task), task)
            return start, jax.vmap(environment.step, (0, 0, None))(bodies, actions, task)

        return compiled(start_and_step)(bodies, actions)

    (start, expected), (same_start, found) = run(in_c), run(in_mjx)
    np.testing.assert_allclose(same_start, start, atol=1e-8)
    for step in (expected, found):
        for leaf in jax.tree.leaves((step.reward, step.state)):
            assert not np.isfinite(leaf[:3]).any() and np.isfinite(leaf[3:]).all()
    comparable = np.arange(len(actions)) > 2
    if make is ant:  # The half-cheetah moves in a plane, so friction has one axis.
        comparable[3:] &= ~steep_and_low(bodies.state[3:])
    assert comparable.sum() > 80
    np.testing.assert_allclose(found.state.state[comparable], expected.state.state[comparable], atol=1e-8)
    np.testing.assert_allclose(found.reward[comparable], expected.reward[comparable], atol=1e-8)
    np.testing.assert_array_equal(found.done[comparable], expected.done[comparable])
    if make is ant:
        forces, felt = (jax.vmap(contact_forces)(step.state.sensors)[comparable] for step in (found, expected))
        np.testing.assert_allclose(forces, felt, atol=1e-6)
        assert (felt != 0).any((1, 2)).sum() > 20


def test_missing_mjx_and_unknown_physics_raise(monkeypatch):
    with pytest.raises(ValueError, match="physics must be one of 'mujoco', 'mjx', but got 'moon'"):
        half_cheetah("velocity", physics="moon")
    monkeypatch.setattr("importlib.metadata.version", {"mujoco": "4.0.0", "mujoco-mjx": "3.17.0"}.get)
    with pytest.raises(RuntimeError, match=r"mujoco-mjx 3.17.0 and mujoco 4.0.0: pip install 'mujoco==3.17.0'"):
        half_cheetah("velocity", physics="mjx")
    monkeypatch.setitem(sys.modules, "mujoco.mjx", None)
    monkeypatch.delattr("mujoco.mjx", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'maml-jax\[mjx\]'"):
        half_cheetah("velocity", physics="mjx")
