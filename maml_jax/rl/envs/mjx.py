"""MuJoCo's physics within XLA (MJX), for accelerators: the functions of `engine.Engine`, without a call to the host."""

from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax.rl.envs.mujoco import Seen

LARGEST = 1e10
"""Of positions, speeds and accelerations; beyond, the C engine gives a simulation up (its `mjMAXVAL`)."""


class MjxEngine:
    """A MuJoCo model in MJX. Its functions are pure, of one state; `vmap` adds others.

    On a CPU it is far slower than the C engine. It differs in one thing: where a capsule that stands more
    steeply than 60 degrees touches the floor, the pyramid that MJX puts in place of the cone of friction is
    turned about the vertical. MJX has no sensors of all contacts of a part: what the model's would say is
    told from the forces on bodies, one for each part, in the form that `locomotion.contact_forces` reads.

    Args:
      path: the model's XML file, without sensors or with those of our ant.

    Raises:
      ModuleNotFoundError: if MJX is not installed, saying how to install it.
      RuntimeError: if its version is not MuJoCo's, as their physics then differ.
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
                "MJX needs MuJoCo of its own version, but here are mujoco-mjx {} and mujoco {}: "
                "pip install 'mujoco=={}'.".format(*versions, versions[0])
            )
        self.model: Any = mujoco.MjModel.from_xml_path(str(path))
        self.sizes = (self.model.nq, self.model.nv, self.model.nu)
        self.start = self.model.key_qpos[0] if self.model.nkey else self.model.qpos0
        self._mjx = mjx
        known = mjx.put_model(mujoco.MjModel.from_xml_string(as_mjx_takes_it(path)))
        self._on_host = jax.tree.map(np.asarray, (known, mjx.make_data(known)))  # So that they belong to no device.

    def step(self, state: jax.Array, control: jax.Array) -> Seen:
        """One time step, `[nq + nv]` and `[nu]` to what is seen after it."""
        model, data, sound = self._given(state, control)
        data = self._mjx.step(model, data)
        after = jnp.concatenate([data.qpos, data.qvel])
        sound &= (jnp.abs(jnp.concatenate([state, data.qacc, after])) <= LARGEST).all()
        return self._seen(jnp.where(sound, after, state), control, sound)

    def read(self, state: jax.Array) -> Seen:
        """The state itself with its sensors, under no control."""
        return self._seen(state, jnp.zeros(self.model.nu, state.dtype), jnp.array(True))

    def _given(self, state: jax.Array, control: jax.Array) -> tuple[Any, Any, jax.Array]:
        """Model and data at a state, and whether that is finite; at the start if it is not."""
        model, data = jax.tree.map(jnp.asarray, self._on_host)
        sound = jnp.isfinite(state).all() & jnp.isfinite(control).all()
        state = jnp.where(sound, state, jnp.asarray([*self.start, *np.zeros(self.model.nv)], state.dtype))
        positions, speeds = jnp.split(state, [self.model.nq])
        return model, data.replace(qpos=positions, qvel=speeds, ctrl=jnp.where(sound, control, 0)), sound

    def _seen(self, state: jax.Array, control: jax.Array, sound: jax.Array) -> Seen:
        sensors = jnp.zeros(0, state.dtype)
        model, data, finite = self._given(state, control)
        if self.model.nsensordata:
            data = self._mjx.rne_postconstraint(model, self._mjx.forward(model, data))
            centre, velocity = jnp.split(data.sensordata, 2)
            torque, force = jnp.split(data._impl.cfrc_ext[1:], 2, axis=1)  # About the centre; the first is the world's.
            contacts = jnp.concatenate([force, torque, jnp.broadcast_to(centre, force.shape)], 1)
            sensors = jnp.concatenate([centre, velocity, contacts.ravel()])
        return Seen(*(jnp.where(sound & finite, leaf, jnp.nan).astype(state.dtype) for leaf in (state, sensors)))


def as_mjx_takes_it(path: Path) -> str:
    """The model's XML without the sensors of contacts, which MJX does not have.

    Where there were some, each part that was one of a body's becomes a body, as MJX tells the forces of those, with
    contacts like all others.
    """
    tree = ElementTree.parse(path)
    contacts = [(sensors, contact) for sensors in tree.iter("sensor") for contact in sensors.findall("contact")]
    for sensors, contact in contacts:
        sensors.remove(contact)
    for body in list(tree.iter("body")) if contacts else []:
        for part in body.findall("geom")[1:]:
            place = list(body).index(part)
            body.remove(part)
            apart = ElementTree.Element("body", name=part.get("name", ""))
            apart.append(part)
            body.insert(place, apart)
    for pair in tree.iter("pair") if contacts else ():
        pair.attrib.pop("class", None)
    return ElementTree.tostring(tree.getroot(), encoding="unicode")
