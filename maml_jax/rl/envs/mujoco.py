"""MuJoCo's C engine as a pure function of JAX, many states at a time."""

import ctypes
import queue
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax.parallel import backend

MODELS = Path(__file__).parent / "models"

START = 1.0
"""The engine's clock before every step: an engine that has reset itself shows by a clock that went back."""


class Seen(NamedTuple):
    """What the engine returns; everything is NaN where the simulation went wrong."""

    state: Any
    """`[..., nq + nv]`: positions and velocities."""
    sensors: Any
    """`[..., sensors]`: of the model, at that state; `[..., 0]` if it has none."""


class _Worker(NamedTuple):
    """What simulates for one call."""

    pool: Any
    """Of threads."""
    memory: list[Any]
    """Of each thread."""


class Engine:
    """A MuJoCo model, and host memory to simulate it in. With one, `MjData.timer` may stand still.

    Its functions are pure: a result depends on nothing but the arguments. Under any nest of `vmap` they
    reach the host as one call for all states of a device, which uses the device's share of the cores. Over several CPU
    devices of one process XLA needs a thread more than devices, or large calls can hang: the experiments see to it,
    and programs of one's own set `NPROC` before JAX starts.

    Args:
      path: the model's XML file.

    Raises:
      ModuleNotFoundError: if mujoco is not installed, saying how to install it.
    """

    def __init__(self, path: Path):
        try:
            import mujoco
            import mujoco.rollout
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "This environment needs the MuJoCo engine: pip install 'maml-jax[mujoco]', or in a checkout "
                "pip install -e '.[mujoco]'."
            ) from error
        self._mujoco: Any = mujoco
        if mujoco.get_mjcb_time() is None:  # Else it is the user's.
            _stop_clock(Path(mujoco.__file__).parent)
        self.model: Any = mujoco.MjModel.from_xml_path(str(path))
        self.sizes = (self.model.nq, self.model.nv, self.model.nu)
        self.start = self.model.key_qpos[0] if self.model.nkey else self.model.qpos0
        # The engine's sensors tell of the state before a step. They are read after it, by the cheapest
        # step from there, whose outcome is thrown away; the step itself goes without.
        self._reader = mujoco.MjModel.from_xml_path(str(path)) if self.model.nsensordata else None
        if self._reader is not None:
            self._reader.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
            self._reader.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_EULERDAMP
            self.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_SENSOR
        for model in filter(None, (self.model, self._reader)):  # One body is one island: a search finds nothing.
            model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_ISLAND
        self._workers: queue.SimpleQueue[_Worker] | None = None
        self._lock = threading.Lock()

    def step(self, state: jax.Array, control: jax.Array) -> Seen:
        """One time step, `[nq + nv]` and `[nu]` to what is seen after it."""
        return self._call(self._step, state, control)

    def read(self, state: jax.Array) -> Seen:
        """The state itself with its sensors, under no control."""
        return self._call(self._read, state, jnp.zeros(self.model.nu, state.dtype))

    def pictures(self, positions: np.ndarray, height: int = 120, width: int = 160) -> np.ndarray:
        """Renders `[N, nq]` from the side: `[N, height, width, 3]`, bytes.

        Raises:
          RuntimeError: if there is no OpenGL, saying what to set.
        """
        import mujoco

        try:
            renderer = mujoco.Renderer(self.model, height, width)
        except Exception as error:  # Each of OpenGL's many ways has errors of its own.
            raise RuntimeError(
                f"Rendering found no OpenGL ({error!r}). Without a display, set the variable MUJOCO_GL to egl or "
                "osmesa."
            ) from error
        data = mujoco.MjData(self.model)
        images = []
        with renderer:
            for position in positions:
                data.qpos[:] = position
                mujoco.mj_forward(self.model, data)
                renderer.update_scene(data, camera="side")
                images.append(renderer.render())
        return np.stack(images)

    def _call(self, function: Any, state: jax.Array, control: jax.Array) -> Seen:
        shapes = Seen(
            jax.ShapeDtypeStruct(state.shape, state.dtype),
            jax.ShapeDtypeStruct((self.model.nsensordata,), state.dtype),
        )
        return jax.pure_callback(function, shapes, state, control, vmap_method="broadcast_all")

    def _step(self, state: Any, control: Any) -> Seen:
        rows, control, sound = self._given(state, control)
        after, _ = self._simulate(self.model, rows, control)
        went_well = (after[:, 0] > START) & np.isfinite(after).all(1)
        sound[sound] = went_well
        after, control = after[went_well], control[went_well]
        after[:, 0] = START
        return self._result(state, after, control, sound)

    def _read(self, state: Any, control: Any) -> Seen:
        return self._result(state, *self._given(state, control))

    def _given(self, state: Any, control: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of the engine's full state and of controls where both are finite, and where that is.

        What is not finite may not enter the engine, and takes none of its time.
        """
        control = np.asarray(control, np.float64).reshape(-1, control.shape[-1])
        rows = np.empty((len(control), 1 + state.shape[-1]))
        rows[:, 0], rows[:, 1:] = START, np.asarray(state).reshape(-1, state.shape[-1])
        sound = np.isfinite(rows).all(1) & np.isfinite(control).all(1)
        return rows[sound], control[sound], sound

    def _result(self, like: Any, after: np.ndarray, control: np.ndarray, sound: np.ndarray) -> Seen:
        """What is seen at the rows `after` of the full state, NaN where it is not `sound`, in the shape of `like`."""
        sensors = np.zeros((len(after), 0))
        if self._reader is not None:
            _, sensors = self._simulate(self._reader, after, control)

        def spread(values: np.ndarray) -> Any:
            everywhere = np.full((len(sound), values.shape[1]), np.nan, like.dtype)
            everywhere[sound] = values
            return everywhere.reshape(*like.shape[:-1], values.shape[1])

        return Seen(spread(after[:, 1:]), spread(sensors))

    def _simulate(self, model: Any, state: np.ndarray, control: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """States after one step, and sensors before it."""
        after, sensors = np.empty(state.shape), np.empty((len(state), model.nsensordata))
        if not len(state):
            return after, sensors
        workers = self._all_workers()
        worker = workers.get()
        try:
            worker.pool.rollout(
                [model] * len(state),
                worker.memory,
                state,
                control[:, None],
                nstep=1,
                state=after[:, None],
                sensordata=sensors[:, None],
                skip_checks=True,  # They take longer than some ten steps of half-cheetah.
            )
        finally:
            workers.put(worker)
        return after, sensors

    def _all_workers(self) -> "queue.SimpleQueue[_Worker]":
        """One for each device of this process, as each calls for itself; made once the devices are known."""
        with self._lock:
            if self._workers is None:
                workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
                devices = jax.local_device_count()
                threads = max(1, backend.cores() // devices)
                for _ in range(devices):
                    # Of one thread: that which calls, without a pool.
                    pool = self._mujoco.rollout.Rollout(nthread=threads if threads > 1 else 0)
                    workers.put(_Worker(pool, [self._mujoco.MjData(self.model) for _ in range(threads)]))
                self._workers = workers
            return self._workers


def _stop_clock(package: Path) -> None:
    """Has the engine no longer look at the clock dozens of times a step, which takes a tenth of it.

    It does so for a profile of its own, `MjData.timer`, which is zero from then on. A program in C has no such clock
    unless it installs one; the Python package installs one whenever it is imported, and cannot take it back. (Seen with
    MuJoCo 3.17; 3.8 looks at a clock of its own, whatever is done here.)
    """
    for path in package.glob("*mujoco.*"):
        if ".so" in path.suffixes or path.suffix in (".dylib", ".dll"):
            library = ctypes.CDLL(str(path))
            if hasattr(library, "mjcb_time"):
                ctypes.c_void_p.in_dll(library, "mjcb_time").value = None
