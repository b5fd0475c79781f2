"""MuJoCo's physics in XLA (MJX), for accelerators: the functions of `mujoco.Engine`, without calls to the host."""

from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax.rl.envs.mujoco import EngineOutput

MAX_VALUE = 1e10
"""Largest position, velocity and acceleration. The C engine aborts a simulation with larger values (`mjMAXVAL`)."""


class MjxEngine:
    """A MuJoCo model in MJX. `step` and `read` are pure functions of one state.

    On a CPU, MJX is far slower than the C engine. The physics of MJX differs in one point: where a capsule that is
    steeper than 60 degrees touches the floor, the friction pyramid of MJX is rotated about the vertical. MJX has no
    contact sensors. This class computes the values of contact sensors from the forces on bodies, with one body for each
    geom, in the form that `locomotion.contact_forces` reads.

    Args:
      path: the model's XML file, without sensors, or with the sensors of `models/ant.xml`.

    Raises:
      ModuleNotFoundError: if MJX is not installed.
      RuntimeError: if the versions of MJX and MuJoCo differ, because the physics of different versions differs.
    """

    def __init__(self, path: Path):
        try:
            import mujoco
            from mujoco import mjx
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "This environment needs MJX: pip install 'maml-jax[mjx]', or in a checkout pip install -e '.[mjx]'."
            ) from error
        versions = [metadata.version(package) for package in ("mujoco-mjx", "mujoco")]
        if len({version.rsplit(".", 1)[0] for version in versions}) > 1:
            raise RuntimeError(
                "MJX needs the same version of MuJoCo, but the installed versions are mujoco-mjx {} and mujoco {}: "
                "pip install 'mujoco=={}'.".format(*versions, versions[0])
            )
        self.model: Any = mujoco.MjModel.from_xml_path(str(path))
        self.sizes = (self.model.nq, self.model.nv, self.model.nu)
        self.start = self.model.key_qpos[0] if self.model.nkey else self.model.qpos0
        self._mjx = mjx
        model = mjx.put_model(mujoco.MjModel.from_xml_string(mjx_xml(path)))
        self._on_host = jax.tree.map(np.asarray, (model, mjx.make_data(model)))  # NumPy arrays, on no device.

    def step(self, state: jax.Array, control: jax.Array) -> EngineOutput:
        """Takes one time step from a state `[nq + nv]` with a control `[nu]`."""
        model, data, finite = self._data_at(state, control)
        data = self._mjx.step(model, data)
        after = jnp.concatenate([data.qpos, data.qvel])
        finite &= (jnp.abs(jnp.concatenate([state, data.qacc, after])) <= MAX_VALUE).all()
        return self._output(jnp.where(finite, after, state), control, finite)

    def read(self, state: jax.Array) -> EngineOutput:
        """Returns a state `[nq + nv]` unchanged, with its sensors for zero control."""
        return self._output(state, jnp.zeros(self.model.nu, state.dtype), jnp.array(True))

    def _data_at(self, state: jax.Array, control: jax.Array) -> tuple[Any, Any, jax.Array]:
        """Returns model and data at a state, or at the start if a value is not finite, and whether all are finite."""
        model, data = jax.tree.map(jnp.asarray, self._on_host)
        finite = jnp.isfinite(state).all() & jnp.isfinite(control).all()
        state = jnp.where(finite, state, jnp.asarray([*self.start, *np.zeros(self.model.nv)], state.dtype))
        positions, velocities = jnp.split(state, [self.model.nq])
        return model, data.replace(qpos=positions, qvel=velocities, ctrl=jnp.where(finite, control, 0)), finite

    def _output(self, state: jax.Array, control: jax.Array, valid: jax.Array) -> EngineOutput:
        sensors = jnp.zeros(0, state.dtype)
        model, data, finite = self._data_at(state, control)
        if self.model.nsensordata:
            data = self._mjx.rne_postconstraint(model, self._mjx.forward(model, data))
            centre, velocity = jnp.split(data.sensordata, 2)
            # Torques are about the centre of mass. Row 0 belongs to the world and is dropped.
            torque, force = jnp.split(data._impl.cfrc_ext[1:], 2, axis=1)
            contacts = jnp.concatenate([force, torque, jnp.broadcast_to(centre, force.shape)], 1)
            sensors = jnp.concatenate([centre, velocity, contacts.ravel()])
        outputs = (jnp.where(valid & finite, leaf, jnp.nan).astype(state.dtype) for leaf in (state, sensors))
        return EngineOutput(*outputs)


def mjx_xml(path: Path) -> str:
    """Returns the XML of a model without contact sensors, which MJX does not have.

    In a model with contact sensors, every geom becomes a body, because MJX computes contact forces only for bodies.
    """
    tree = ElementTree.parse(path)
    contacts = [(sensors, contact) for sensors in tree.iter("sensor") for contact in sensors.findall("contact")]
    for sensors, contact in contacts:
        sensors.remove(contact)
    for body in list(tree.iter("body")) if contacts else []:
        for geom in body.findall("geom")[1:]:
            index = list(body).index(geom)
            body.remove(geom)
            geom_body = ElementTree.Element("body", name=geom.get("name", ""))
            geom_body.append(geom)
            body.insert(index, geom_body)
    for pair in tree.iter("pair") if contacts else ():
        pair.attrib.pop("class", None)
    return ElementTree.tostring(tree.getroot(), encoding="unicode")
