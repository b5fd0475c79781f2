"""Several processes as one run: JAX's own runtime connects them, and here is what they have to agree on.

Process 0 leads: it alone reads and writes the work directory. Where there is one process, it leads, and nothing
here costs anything.
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
LONG = 7 * 24 * 3600  # Seconds: the others wait for process 0, which evaluates alone.
GRACE = 2.0  # Seconds that process 0 lets the others talk, before it ends them by ending.
HEARTBEATS = 30  # Seconds without one, after which a process counts as lost.


class LeaderError(OSError):
    """Process 0 found what keeps all processes from going on."""


def connect(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Makes this process one of several; without a coordinator it is the only one. Before JAX is used.

    From then on an error that nobody catches ends the process at once, without waiting for the others as JAX does at
    an orderly end: they notice, and end too. So let one process alone end by `exit_process`, not by SystemExit.

    Args:
      coordinator: `HOST:PORT` of process 0, which the others can reach; 'auto' where JAX finds out by itself who the
        processes are: on Cloud TPU, under Slurm and under Open MPI.
      processes: how many.
      process: which of them this is, from 0.

    Raises:
      ValueError: naming the argument, what was given and what is allowed; if the processes have not as many devices.
    """
    numbers = {"processes": processes, "process": process}
    if coordinator is None or coordinator == AUTO:
        if given := " and ".join(f"{name} {value}" for name, value in numbers.items() if value is not None):
            raise ValueError(f"{given} is for a coordinator HOST:PORT, but got coordinator {coordinator}.")
        if coordinator == AUTO:
            _connect()
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"coordinator must be HOST:PORT of process 0, or 'auto', but got {coordinator!r}.")
    if processes is None or process is None:
        raise ValueError(f"coordinator {coordinator} needs processes and process too, but got {numbers}.")
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
    def ended(*error: Any) -> None:
        sys.__excepthook__(*error)
        exit_process(1)

    # JAX's own would take the first SIGTERM, and here `signals` grants it.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        cluster_detection_method=cluster_detection_method,
        shutdown_timeout_seconds=LONG,
        heartbeat_timeout_seconds=HEARTBEATS,
    )
    sys.excepthook = ended
    counts = [len(jax.local_devices(number)) for number in range(jax.process_count())]
    if len(set(counts)) > 1:
        raise ValueError(
            f"processes must have as many devices each, but got {counts}: restrict those that have more, such as by "
            "CUDA_VISIBLE_DEVICES or taskset."
        )


def exit_process(status: int) -> NoReturn:
    """Ends this process, at once where there are several: else it would wait for the others, and they for it."""
    if multiple():
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
        sys.stderr.flush()
        if is_leader():
            time.sleep(GRACE)  # The others end with it: first they may say why.
        os._exit(status)
    raise SystemExit(status)


def multiple() -> bool:
    """Whether there is more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_leader() -> bool:
    """Whether this is process 0."""
    return not multiple() or jax.process_index() == 0


def put(tree: Any, sharding: Sharding) -> Any:
    """A tree that every process has as a whole, on all the devices of a sharding; what spans processes already stays.

    As `jax.device_put`, which between processes would send everything through the network to compare it.
    """
    if not multiple():
        return jax.device_put(tree, sharding)

    def one(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf
        if _is_key(leaf):
            return jax.random.wrap_key_data(one(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(one, tree)


def local(tree: Any) -> Any:
    """Of arrays that are the same on all devices, this process's own copy: to be computed with by one process alone."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree) if multiple() else tree


def broadcast_from_leader(fn: Callable[[], T]) -> T:
    """What `fn` returns in process 0, which alone calls it, in all processes: anything for JSON.

    Raises:
      LeaderError: in the others, if `fn` raised in process 0.
    """
    if not multiple():
        return fn()
    said: dict[str, Any] = {}
    error: Exception | None = None
    if is_leader():
        try:
            said = {"value": fn()}
        except Exception as raised:  # Raised again below, once the others know.
            error, said = raised, {"error": str(raised)}
    said = json.loads(_broadcast_bytes(json.dumps(said).encode()))
    if error is not None:
        raise error
    if "error" in said:
        raise LeaderError(f"process 0: {said['error']}")
    return said["value"]


def broadcast_arrays_from_leader(tree: Any, like: Any) -> Any:
    """The arrays that process 0 has, placed as those of `like`; the others give any of the same shapes."""
    from jax.experimental import multihost_utils

    if not multiple():
        return tree

    def one(leaf: Any, placed: Any) -> jax.Array:
        if _is_key(placed):
            data = one(jax.random.key_data(leaf) if _is_key(leaf) else leaf, jax.random.key_data(placed))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(placed))
        values = np.asarray(leaf)
        # As bytes: JAX sends numbers by adding zeros, which makes 0 of -0.
        sent = np.asarray(multihost_utils.broadcast_one_to_all(np.frombuffer(values.tobytes(), np.uint8)))
        return put(sent.view(values.dtype).reshape(values.shape), placed.sharding)

    return jax.tree.map(one, tree, like)


def all_gather_text(text: str) -> list[str]:
    """What every process says, in at most `MAX_BYTES` bytes each."""
    from jax.experimental import multihost_utils

    if not multiple():
        return [text]
    said = np.frombuffer(text.encode()[:MAX_BYTES].ljust(MAX_BYTES, b"\0"), np.uint8)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in multihost_utils.process_allgather(said)]


MAX_BYTES = 4096


def stop_requests(stop_request: bool, sharding: Sharding) -> Any:
    """For a compiled program on the devices of `sharding`, whose `any` is whether a process has been asked to stop."""
    if not multiple():
        return np.asarray(stop_request)
    if not isinstance(sharding, NamedSharding):
        raise ValueError("With several processes a learner needs all their devices: give it mesh=task_mesh(T).")
    each = NamedSharding(sharding.mesh, PartitionSpec(sharding.mesh.axis_names))
    return jax.make_array_from_callback((sharding.mesh.size,), each, lambda index: np.array([stop_request]))


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(jax.numpy.result_type(leaf), jax.dtypes.prng_key)


def _broadcast_bytes(content: bytes) -> bytes:
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    sent = np.frombuffer(content, np.uint8) if is_leader() else np.zeros(size, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent)))
