"""Runs with several processes: connecting, exchanging data, and placing arrays on all devices.

Process 0 is the leader: only the leader reads and writes the run directory. If there is only one process, it is the
leader, and the functions of this module do not communicate. JAX's distributed runtime connects the processes.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from maml_jax import validation

T = TypeVar("T")

AUTO = "auto"
SHUTDOWN_TIMEOUT = 7 * 24 * 3600  # Seconds that other processes wait for process 0, which evaluates alone.
EXIT_DELAY = 2.0  # Seconds that process 0 waits before it exits, so that the other processes can report errors.
HEARTBEAT_TIMEOUT = 30  # Seconds without a heartbeat after which a process counts as lost.
MAX_BYTES = 4096  # The longest text of `all_gather_text`.


class LeaderError(OSError):
    """Process 0 raised an error, so no process can continue."""


def connect(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Connects this process with the other processes of a run. Call this function before JAX is used.

    Without a coordinator this process is the only process. After connecting, an uncaught error ends this process at
    once, and then the other processes. Without this function, JAX would wait for all processes to exit. To end one
    process, call `exit_process` in place of `sys.exit`.

    Args:
      coordinator: `HOST:PORT` of process 0, reachable from all processes. 'auto' lets JAX detect the processes, on
        Cloud TPU, under Slurm and under Open MPI. None runs a single process.
      processes: the number of processes.
      process: the index of this process, from 0.

    Raises:
      ValueError: if an argument is missing or not allowed, or if the processes have different numbers of devices.
    """
    numbers = {"processes": processes, "process": process}
    if coordinator is None or coordinator == AUTO:
        if given := " and ".join(f"{name} {value}" for name, value in numbers.items() if value is not None):
            raise ValueError(f"A run with {given} needs a coordinator HOST:PORT, but got coordinator {coordinator}.")
        if coordinator == AUTO:
            _connect()
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"coordinator must be HOST:PORT of process 0, or 'auto', but got {coordinator!r}.")
    if processes is None or process is None:
        raise ValueError(f"coordinator {coordinator} needs both processes and process, but got {numbers}.")
    validation.at_least("processes", processes, 1)
    if not 0 <= process < processes:
        raise ValueError(f"process must be from 0 to {processes - 1}, one less than processes, but got {process}.")
    _connect(coordinator, processes, process, cluster_detection_method="deactivate")


def _connect(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    cluster_detection_method: str | None = None,
) -> None:
    def exit_on_error(*error: Any) -> None:
        sys.__excepthook__(*error)
        exit_process(1)

    # JAX's preemption service would catch the first SIGTERM, which `runs.signals` handles.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        cluster_detection_method=cluster_detection_method,
        shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
    )
    sys.excepthook = exit_on_error
    counts = [len(jax.local_devices(number)) for number in range(jax.process_count())]
    if len(set(counts)) > 1:
        raise ValueError(
            f"All processes must have the same number of devices, but got {counts}: restrict the devices, for example "
            "with CUDA_VISIBLE_DEVICES or taskset."
        )


def exit_process(status: int) -> NoReturn:
    """Exits with `status`. If there are several processes, this process does not wait for the others."""
    if multiple():
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
        sys.stderr.flush()
        if is_leader():
            time.sleep(EXIT_DELAY)  # When process 0 exits, the other processes end.
        os._exit(status)
    raise SystemExit(status)


def multiple() -> bool:
    """Whether the run has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_leader() -> bool:
    """Whether this is process 0."""
    return not multiple() or jax.process_index() == 0


def put(tree: Any, sharding: Sharding) -> Any:
    """Places arrays that every process holds in full on the devices of `sharding`.

    With several processes, `jax.device_put` would send all arrays over the network to compare them; this function does
    not. Arrays that already span several processes stay where they are.
    """
    if not multiple():
        return jax.device_put(tree, sharding)

    def put_leaf(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf
        if _is_key(leaf):
            return jax.random.wrap_key_data(put_leaf(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(put_leaf, tree)


def local(tree: Any) -> Any:
    """Returns this process's copy of arrays that are equal on all devices, for computations by one process alone."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree) if multiple() else tree


def broadcast_from_leader(fn: Callable[[], T]) -> T:
    """Calls `fn` in process 0, and returns the result in all processes. JSON must be able to represent the result.

    Raises:
      LeaderError: in the other processes, if `fn` raised in process 0. Process 0 raises the error of `fn`.
    """
    if not multiple():
        return fn()
    message: dict[str, Any] = {}
    error: Exception | None = None
    if is_leader():
        try:
            message = {"value": fn()}
        except Exception as raised:  # It is raised below, after the other processes have received the message.
            error, message = raised, {"error": str(raised)}
    message = json.loads(_broadcast_bytes(json.dumps(message).encode()))
    if error is not None:
        raise error
    if "error" in message:
        raise LeaderError(f"process 0: {message['error']}")
    return message["value"]


def broadcast_arrays_from_leader(tree: Any, like: Any) -> Any:
    """Returns the arrays of process 0 in all processes, placed like the arrays of `like`.

    In the other processes only the shapes and types of `tree` matter.
    """
    from jax.experimental import multihost_utils

    if not multiple():
        return tree

    def broadcast(leaf: Any, placed: Any) -> jax.Array:
        if _is_key(placed):
            data = broadcast(jax.random.key_data(leaf) if _is_key(leaf) else leaf, jax.random.key_data(placed))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(placed))
        values = np.asarray(leaf)
        # Sent as bytes: JAX broadcasts numbers by adding zeros, which turns -0 into 0.
        received = np.asarray(multihost_utils.broadcast_one_to_all(np.frombuffer(values.tobytes(), np.uint8)))
        return put(received.view(values.dtype).reshape(values.shape), placed.sharding)

    return jax.tree.map(broadcast, tree, like)


def all_gather_text(text: str) -> list[str]:
    """Returns the texts of all processes, by process index. Texts are cut after `MAX_BYTES` bytes."""
    from jax.experimental import multihost_utils

    if not multiple():
        return [text]
    content = np.frombuffer(text.encode()[:MAX_BYTES].ljust(MAX_BYTES, b"\0"), np.uint8)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in multihost_utils.process_allgather(content)]


def stop_requests(stop: bool, sharding: Sharding) -> Any:
    """Returns the stop requests of all processes as an input of a program compiled for the devices of `sharding`.

    `stop` is the request of this process. In the program, `any()` of the result tells if any process requests a stop.

    Raises:
      ValueError: if several processes run a program that does not use all their devices.
    """
    if not multiple():
        return np.asarray(stop)
    if not isinstance(sharding, NamedSharding):
        raise ValueError("With several processes the learner must use all of their devices: use mesh=task_mesh(T).")
    one_per_device = NamedSharding(sharding.mesh, PartitionSpec(sharding.mesh.axis_names))
    return jax.make_array_from_callback((sharding.mesh.size,), one_per_device, lambda index: np.array([stop]))


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(jax.numpy.result_type(leaf), jax.dtypes.prng_key)


def _broadcast_bytes(content: bytes) -> bytes:
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    message = np.frombuffer(content, np.uint8) if is_leader() else np.zeros(size, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(message)))
