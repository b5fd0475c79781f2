"""Measures from a trace how the time of a compiled meta-step divides among kinds of operations.

    python -m experiments.benchmarks.breakdown --workloads omniglot-20w1s miniimagenet-5w1s

A meta-step is slower than the machine's limit for two reasons: some operations are not matrix products or convolutions,
and products and convolutions may be slower than the limit. The trace uses one core, so that operations do not overlap.
The command prints the shares, and writes results.json and shares.png.
"""

import dataclasses
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
from jax.profiler import ProfileData

from experiments.benchmarks import flops, measure
from experiments.benchmarks.workloads import WorkloadName
from experiments.shared import command_line, plots
from experiments.shared.command_line import DefaultInHelp
from maml_jax.runs.directory import RunDirectory

PRODUCTS = "products and convolutions"
KINDS = {
    PRODUCTS: ("dot", "convolution", "gemm", "ynn", "cublas", "cudnn", "custom-call"),
    "stacks over inner steps": ("dynamic-slice", "dynamic-update-slice"),
    "windows put together": ("concatenate",),
    "slices, pads and their transposes": ("slice", "pad", "gather", "scatter"),
    "copies and transposes": ("copy", "transpose"),
    "sums": ("reduce",),
}
"""Kinds of operations by words in XLA's names. The first kind with a matching word applies, or else elementwise."""
ELEMENTWISE = "each entry alone"
CONTAINERS = ("while", "call", "conditional")
"""Operations whose time includes the time of other operations."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Traces one meta-step of each workload."""

    workloads: tuple[WorkloadName, ...] = ("omniglot-5w1s", "omniglot-20w1s", "miniimagenet-5w1s")
    """Workloads. Each has a model and a meta-batch."""
    orders: tuple[Literal[1, 2], ...] = (2, 1)
    """Orders of the meta-gradient. 2: exact; 1: first-order approximation."""
    workdir: DefaultInHelp[Path | None] = None
    """Directory of the results. Default: a new directory in runs/."""


def prepare(config: Config) -> Config:
    """Checks the options.

    Raises:
      ValueError: if there is no workload or no order.
      OSError: if the work directory holds another run, or cannot be written.
    """
    for name in ("workloads", "orders"):
        if not getattr(config, name):
            raise ValueError(f"{name} must have at least one value, but got none.")
    RunDirectory.check(config.workdir)
    return config


def main(config: Config) -> dict[str, Any]:
    """Traces the meta-steps; returns the content of `results.json`."""
    run = RunDirectory(config.workdir, "breakdown")
    print(f"Writing to {run.path}", flush=True)
    rows = []
    for workload in config.workloads:
        for order in config.orders:
            found = breakdown(measure.Variant(workload, order, devices=1))
            rows.append({"workload": workload, "order": order, **found})
            print(summary(rows[-1]), flush=True)
    results = {"config": dataclasses.asdict(config), "device": jax.devices()[0].device_kind, "rows": rows}
    path = run.write_results(results)
    plots.shares(run.path / "shares.png", {title(row): row["shares"] for row in rows}, "a meta-step's time")
    print(f"Wrote {path}, with shares.png in the same folder.")
    return results


def breakdown(variant: measure.Variant, compiled: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Returns the times of a meta-step and of its operations in ms, the shares of the kinds, and the rate of products.

    Args:
      variant: the variant.
      compiled: called after compilation and before the first measurement.

    Raises:
      RuntimeError: if the trace has no matrix product with a known name.
    """
    step, state, tasks, _ = measure.program(variant)
    gflop = flops.count(jax.make_jaxpr(step)(state, tasks).jaxpr) / 1e9
    run = jax.jit(step, donate_argnums=0).lower(state, tasks).compile()
    compiled()
    limit = measure.product_rate(variant.dtype, jax.devices()[:1])
    state, _ = jax.block_until_ready(run(state, tasks))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            jax.block_until_ready(run(state, tasks))
            wall = time.perf_counter() - start
        (file,) = Path(folder).rglob("*.xplane.pb")
        operations = durations(ProfileData.from_file(str(file)))
    kinds: Counter[str] = Counter(dict.fromkeys((*KINDS, ELEMENTWISE), 0.0))
    for name, milliseconds in operations.items():
        kinds[kind(name)] += milliseconds
    total = kinds.total()
    if not kinds[PRODUCTS]:
        raise RuntimeError(f"The trace has no matrix product. Its operations are: {', '.join(operations) or 'none'}.")
    return {
        "ms": 1e3 * wall,
        "ms_in_operations": total,
        "shares": {name: milliseconds / total for name, milliseconds in kinds.items()},
        "limit_gflops": limit,
        "products_of_limit": gflop / kinds[PRODUCTS] * 1e3 / limit,
        "largest_ms": dict(operations.most_common(20)),
    }


def durations(trace: ProfileData) -> Counter[str]:
    """Returns the time of XLA operations in ms, by name without number and without operations that contain others."""
    found: Counter[str] = Counter()
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")  # The kernels of a GPU have other names.
                name = str(operation).split(".")[0]
                if operation and name not in CONTAINERS:
                    found[name] += event.duration_ns / 1e6
    return found


def kind(name: str) -> str:
    """Returns the kind of an operation by its name."""
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), ELEMENTWISE)


def title(row: dict[str, Any]) -> str:
    """Describes the variant of a row."""
    return f"{row['workload']}, {'second' if row['order'] == 2 else 'first'} order"


def summary(row: dict[str, Any]) -> str:
    """Formats a row as a line of text."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in row["shares"].items())
    rate = f"products at {row['products_of_limit']:.0%} of the limit"
    return f"{title(row)}, {row['ms']:.3g} ms with the trace: {shares}; {rate}"


if __name__ == "__main__":
    command_line.run(Config, prepare, main, small=True)
