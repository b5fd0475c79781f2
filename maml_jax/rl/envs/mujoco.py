"""MuJoCo's C engine as pure JAX functions, for many states at a time."""

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

START_TIME = 1.0
"""Simulation time before every step, in s. The time is later after a step, unless the engine reset the simulation."""


class EngineOutput(NamedTuple):
    """A state of the engine with its sensors; all entries are NaN where the simulation failed."""

    state: Any
    """`[..., nq + nv]`: positions and velocities."""
    sensors: Any
    """`[..., sensors]`: the sensors of the model at this state; `[..., 0]` for a model without sensors."""


class _Worker(NamedTuple):
    """Threads and memory for one call at a time."""

    pool: Any
    """A pool of threads."""
    memory: list[Any]
    """An `MjData` for each thread."""


class Engine:
    """A MuJoCo model with host memory to simulate it.

    `step` and `read` are pure functions of one state. Under nested `vmap`s they call the host once for all states of a
    device. The devices share the CPU cores equally. With several CPU devices in one process, XLA needs more threads
    than devices, or large calls can hang. Set the environment variable NPROC to the number of threads before JAX
    starts. The commands in `experiments` set NPROC.

    The constructor turns the profiler `MjData.timer` off in the whole process.

    Args:
      path: the model's XML file.

    Raises:
      ModuleNotFoundError: if mujoco is not installed.

    References:
      Todorov, Erez and Tassa 2012, "MuJoCo: A physics engine for model-based control".
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
        if mujoco.get_mjcb_time() is None:  # Keep a clock that the user has installed.
            _stop_clock(Path(mujoco.__file__).parent)
        self.model: Any = mujoco.MjModel.from_xml_path(str(path))
        self.sizes = (self.model.nq, self.model.nv, self.model.nu)
        self.start = self.model.key_qpos[0] if self.model.nkey else self.model.qpos0
        # A step of the engine computes the sensors of the state before the step. To read the sensors of the state after
        # the step, a second model takes the cheapest possible step from this state. Only its sensors are kept. The
        # sensors of the first model are turned off.
        self._reader = mujoco.MjModel.from_xml_path(str(path)) if self.model.nsensordata else None
        if self._reader is not None:
            self._reader.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
            self._reader.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_EULERDAMP
            self.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_SENSOR
        for model in filter(None, (self.model, self._reader)):  # Each model is one island: skip the search for islands.
            model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_ISLAND
        self._workers: queue.SimpleQueue[_Worker] | None = None
        self._lock = threading.Lock()

    def step(self, state: jax.Array, control: jax.Array) -> EngineOutput:
        """Takes one time step from a state `[nq + nv]` with a control `[nu]`."""
        return self._call(self._step, state, control)

    def read(self, state: jax.Array) -> EngineOutput:
        """Returns a state `[nq + nv]` unchanged, with its sensors for zero control."""
        return self._call(self._read, state, jnp.zeros(self.model.nu, state.dtype))

    def pictures(self, positions: np.ndarray, height: int = 120, width: int = 160) -> np.ndarray:
        """Renders an image of each position, seen by the camera 'side' of the model.

        Args:
          positions: `[N, nq]`.
          height: height of an image in pixels.
          width: width of an image in pixels.

        Returns:
          Images `[N, height, width, 3]`, uint8.

        Raises:
          RuntimeError: if OpenGL is not available.
        """
        import mujoco

        try:
            renderer = mujoco.Renderer(self.model, height, width)
        except Exception as error:  # The implementations of OpenGL raise different errors.
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

    def _call(self, function: Any, state: jax.Array, control: jax.Array) -> EngineOutput:
        shapes = EngineOutput(
            jax.ShapeDtypeStruct(state.shape, state.dtype),
            jax.ShapeDtypeStruct((self.model.nsensordata,), state.dtype),
        )
        return jax.pure_callback(function, shapes, state, control, vmap_method="broadcast_all")

    def _step(self, state: Any, control: Any) -> EngineOutput:
        rows, control, finite = self._select(state, control)
        after, _ = self._simulate(self.model, rows, control)
        succeeded = (after[:, 0] > START_TIME) & np.isfinite(after).all(1)
        finite[finite] = succeeded
        after, control = after[succeeded], control[succeeded]
        after[:, 0] = START_TIME
        return self._result(state, after, control, finite)

    def _read(self, state: Any, control: Any) -> EngineOutput:
        return self._result(state, *self._select(state, control))

    def _select(self, state: Any, control: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Selects the rows where state and control are finite. The engine simulates only these rows.

        Returns:
          The selected rows of the engine's full state (time, positions, velocities), the selected controls, and a mask
          of the selected rows.
        """
        control = np.asarray(control, np.float64).reshape(-1, control.shape[-1])
        rows = np.empty((len(control), 1 + state.shape[-1]))
        rows[:, 0], rows[:, 1:] = START_TIME, np.asarray(state).reshape(-1, state.shape[-1])
        finite = np.isfinite(rows).all(1) & np.isfinite(control).all(1)
        return rows[finite], control[finite], finite

    def _result(self, like: Any, after: np.ndarray, control: np.ndarray, finite: np.ndarray) -> EngineOutput:
        """Reads the sensors of the rows `after`; returns the shape of `like`, with NaN where `finite` is false."""
        sensors = np.zeros((len(after), 0))
        if self._reader is not None:
            _, sensors = self._simulate(self._reader, after, control)

        def fill(values: np.ndarray) -> Any:
            filled = np.full((len(finite), values.shape[1]), np.nan, like.dtype)
            filled[finite] = values
            return filled.reshape(*like.shape[:-1], values.shape[1])

        return EngineOutput(fill(after[:, 1:]), fill(sensors))

    def _simulate(self, model: Any, state: np.ndarray, control: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Takes one step. Returns the full states after the step, and the sensors before the step."""
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
                skip_checks=True,  # The checks take longer than ten steps of the half-cheetah.
            )
        finally:
            workers.put(worker)
        return after, sensors

    def _all_workers(self) -> "queue.SimpleQueue[_Worker]":
        """Returns a queue with a worker for each device of this process, because devices call independently."""
        with self._lock:
            if self._workers is None:
                workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
                devices = jax.local_device_count()
                threads = max(1, backend.cores() // devices)
                for _ in range(devices):
                    # With nthread=0 the calling thread simulates.
                    pool = self._mujoco.rollout.Rollout(nthread=threads if threads > 1 else 0)
                    workers.put(_Worker(pool, [self._mujoco.MjData(self.model) for _ in range(threads)]))
                self._workers = workers
            return self._workers


def _stop_clock(package: Path) -> None:
    """Removes the clock that the mujoco package installs in the engine for the profiler `MjData.timer`.

    The engine reads the clock dozens of times a step. Without it, a step of the half-cheetah takes 20% less time and a
    step of the ant 7% less (MuJoCo 3.17 and 4.0, one core). The package has no function to remove the clock; MuJoCo 3.8
    has another clock, which this function does not stop.
    """
    for path in package.glob("*mujoco.*"):
        if ".so" in path.suffixes or path.suffix in (".dylib", ".dll"):
            library = ctypes.CDLL(str(path))
            if hasattr(library, "mjcb_time"):
                ctypes.c_void_p.in_dll(library, "mjcb_time").value = None
