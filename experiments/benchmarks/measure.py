"""Measures one variant of one workload, and prints a line of JSON.

    python -m experiments.benchmarks.measure '{"workload": "sinusoid"}'

`experiments.benchmark` starts a process of this module for every measurement.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import maml_jax
from experiments.benchmarks import flops, workloads
from experiments.shared.command_line import use_cores
from maml_jax.inner import Remat
from maml_jax.parallel.task_axis import TaskBatchSize, task_mesh
from maml_jax.types import MetaState, Task

PRODUCT, ACCELERATOR_PRODUCT = 1024, 8192
"""Size of the square matrices whose product measures the limit, of a CPU and of an accelerator."""

KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, _, params: (jax.tree.map(jnp.zeros_like, params), grads),
)
"""An outer optimizer that does not change the parameters, and whose state is the meta-gradient."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compute a meta-step."""

    workload: str
    order: int = 2
    inner_steps: int | None = None
    remat: Remat = "none"
    task_batch_size: TaskBatchSize = None
    implementation: Any = None
    dtype: str = "float32"
    devices: int | None = None
    precision: str | None = None
    """Precision of products in float32, as in `jax.default_matmul_precision`; None: JAX's default for the backend."""


class Program(NamedTuple):
    """A meta-step before compilation, with its arguments."""

    step: Callable[[MetaState, Task], tuple[MetaState, Any]]
    state: MetaState
    tasks: Task
    mesh: jax.sharding.Mesh | None


def program(variant: Variant, outer: optax.GradientTransformation | None = None) -> Program:
    """Returns the meta-step of a variant, with Adam or with the optimizer `outer`.

    Raises:
      ValueError: if the variant needs more devices than JAX has.
    """
    if variant.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", variant.precision)
    work = workloads.build(variant.workload, variant.dtype, variant.implementation)
    mesh = task_mesh(len(jax.tree.leaves(work.tasks)[0])) if variant.devices is None and not is_small(variant) else None
    if variant.devices is not None and variant.devices > len(jax.devices()):
        raise ValueError(f"devices must be at most {len(jax.devices())}, but got {variant.devices}.")
    if variant.devices is not None and variant.devices > 1:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[: variant.devices]), ("tasks",))
    options: dict[str, Any] = {"steps": variant.inner_steps or work.inner_steps, "order": variant.order}
    inner = maml_jax.sgd(work.inner_rate, trainable=work.trainable, remat=variant.remat, **options)
    outer = outer or optax.adam(1e-3)
    learner = maml_jax.maml(work.loss_fn, inner, outer, task_batch_size=variant.task_batch_size, mesh=mesh)
    return Program(learner.step, learner.init(work.init()), work.tasks, mesh)


def measure(variant: Variant, seconds: float, compiled: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Measures a variant: times of a meta-step in ms, memory in bytes, operations, and the machine's limit in GFLOP/s.

    Args:
      variant: the variant.
      seconds: the duration of the measurement.
      compiled: called after compilation and before the first measurement.

    Raises:
      FloatingPointError: if the parameters are not finite after the measurement.
    """
    step, state, tasks, mesh = program(variant)
    count = len(jax.tree.leaves(tasks)[0])

    def many(state: Any, tasks: Any, count: jax.Array) -> Any:
        return jax.lax.fori_loop(0, count, lambda _, state: step(state, tasks)[0], state)

    operations = flops.count(jax.make_jaxpr(step)(state, tasks).jaxpr)
    if mesh is not None:
        operations *= mesh.size  # The count is that of one device's program.
    lowered = jax.jit(many, donate_argnums=0).lower(state, tasks, 1)
    start = time.perf_counter()
    run = lowered.compile()
    compilation = time.perf_counter() - start
    compiled()
    memory = run.memory_analysis()
    state, memory_measured = with_peak_memory(lambda: run(state, tasks, 1))
    start = time.perf_counter()
    state = jax.block_until_ready(run(state, tasks, 1))
    per_call = max(1, int(0.3 / (time.perf_counter() - start)))
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        state = jax.block_until_ready(run(state, tasks, per_call))
        times.append(1e3 * (time.perf_counter() - start) / per_call)
    if not np.isfinite(float(jnp.abs(jax.tree.leaves(state.params)[0]).max())):
        raise FloatingPointError("The parameters are not finite after the measurement: the times are not meaningful.")
    return {
        "ms": times,
        "tasks": count,
        "compile_s": compilation,
        "memory_compiled": memory.temp_size_in_bytes if memory else None,
        "memory_measured": memory_measured,
        "gflop": operations / 1e9,
        "limit_gflops": limit(variant),
        "devices_used": mesh.size if mesh is not None else 1,
    }


def gradient_error(variant: Variant) -> float:
    """Returns the relative error of the variant's meta-gradient, `|g - g64| / |g64|`, against float64."""
    found = []
    given: Any = None
    for each in (variant, dataclasses.replace(variant, dtype="float64", precision="float32")):
        step, state, tasks, _ = program(each, KEEP_GRADIENT)
        given = given or (state, tasks)
        # The exact gradient is that at the same parameters and inputs, in float64.
        same = jax.tree.map(lambda value, like: jnp.asarray(value, like.dtype), given, (state, tasks))
        gradient = jax.tree.leaves(jax.jit(step)(*same)[0].opt_state)
        found.append(np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in gradient]))
    own, exact = found
    return float(np.linalg.norm(own - exact) / np.linalg.norm(exact))


def with_peak_memory(run: Callable[[], Any]) -> tuple[Any, int | None]:
    """Calls `run`, and measures the peak of its memory beyond the memory in use before.

    On a CPU, Linux reports the peak of the process, for all devices together. The peak does not count memory that was
    freed before the call and is reused. On an accelerator, the allocator reports the peak of the first device.

    Returns:
      The result of `run`, and the peak in bytes, or None if it is not reported.
    """
    device, status, reset = jax.devices()[0], Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.platform != "cpu":
        before = device.memory_stats() or {}
        result = jax.block_until_ready(run())
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
        # The allocator reports the peak since the start of the process. This call may not have reached it.
        known = peak > before.get("peak_bytes_in_use", peak)
        return result, peak - before["bytes_in_use"] if known else None
    if not reset.exists():
        return jax.block_until_ready(run()), None

    def resident(kind: str) -> int:
        return 1024 * int(status.read_text().split(f"{kind}:")[1].split()[0])

    reset.write_text("5")  # Resets the peak to the memory in use.
    before_call = resident("VmRSS")
    result = jax.block_until_ready(run())
    return result, resident("VmHWM") - before_call


def limit(variant: Variant) -> float:
    """Returns the machine's limit in GFLOP/s on all cores.

    A process that measures a small net uses one core. It starts another process, with all cores, to measure the limit.
    """
    if not is_small(variant) or jax.default_backend() != "cpu":
        return product_rate(variant.dtype)
    command = [sys.executable, "-m", "experiments.benchmarks.measure", json.dumps({"product": variant.dtype})]
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return float(done.stdout)


def is_small(variant: Variant) -> bool:
    """Whether the workload runs with `command_line.use_cores(small=True)`."""
    return variant.workload in workloads.SMALL and variant.devices is None


def product_rate(dtype: str, devices: Sequence[jax.Device] | None = None) -> float:
    """Returns the rate of products of large matrices in GFLOP/s, on all devices at once or on the given devices."""
    size, repeats = PRODUCT if jax.default_backend() == "cpu" else ACCELERATOR_PRODUCT, 8
    devices = devices or jax.devices()
    factors = [jax.device_put(jnp.full((size, size), 1e-3, dtype), device) for device in devices]
    run = jax.jit(lambda a: jax.lax.fori_loop(0, repeats, lambda _, product: product @ a, a))
    best = np.inf
    for _ in range(8):
        start = time.perf_counter()
        jax.block_until_ready([run(factor) for factor in factors])
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 * repeats * len(devices) / best / 1e9


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if "product" in given:
        use_cores()
        jax.config.update("jax_enable_x64", given["product"] == "float64")
        print(product_rate(given["product"]))
        sys.exit()
    seconds = given.pop("seconds", 3.0)
    if folder := given.pop("compiled", None):
        jax.config.update("jax_compilation_cache_dir", folder)
    variant = Variant(**given)
    use_cores(is_small(variant))
    print(json.dumps(measure(variant, seconds)))
