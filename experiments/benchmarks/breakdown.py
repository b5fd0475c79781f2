"""Measures the shares of kinds of operations in the time of a compiled meta-step, from a trace.

    python -m experiments.benchmarks.breakdown --workloads omniglot-20w1s miniimagenet-5w1s

A meta-step falls short of the machine's limit because of operations other than matrix products and convolutions, and
because of the rate of these. The trace is of one core, so that operations do not overlap. Prints the shares, and writes
results.json and shares.png.
"""

import dataclasses
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import jax
from jax.profiler import ProfileData

from experiments.benchmarks import flops, measure
from experiments.benchmarks.workloads import WorkloadName
from experiments.shared import command_line, plots
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
"""Words in XLA's names of operations. An operation has the first kind that matches; all others are elementwise."""
ELEMENTWISE = "each entry alone"
CONTAINERS = ("while", "call", "conditional")
"""Operations that contain others, whose time they include."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Traces one meta-step of each workload."""

    workloads: tuple[WorkloadName, ...] = ("omniglot-5w1s", "omniglot-20w1s", "miniimagenet-5w1s")
    """Workloads: a model with a meta-batch each."""
    orders: tuple[Literal[1, 2], ...] = (2, 1)
    """Order of the meta-gradient: second or first."""
    workdir: Path | None = None
    """Directory of the results. Default: a new directory below runs/."""


def prepare(config: Config) -> Config:
    """Checks the options.

    Raises:
      ValueError: if there is no workload or no order.
      OSError: if the work directory holds another run, or cannot be written.
    """
    for name in ("workloads", "orders"):
        if not getattr(config, name):
            raise ValueError(f"{name} must name at least one, but got none.")
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
    print(f"Wrote {path}, and shares.png beside it.")
    return results


def breakdown(variant: measure.Variant) -> dict[str, Any]:
    """Times of a meta-step and of its operations in ms, shares of the kinds, and the rate of the products.

    Raises:
      RuntimeError: if the trace has no matrix product with a known name.
    """
    step, state, tasks, _ = measure.program(variant)
    gflop = flops.count(jax.make_jaxpr(step)(state, tasks).jaxpr) / 1e9
    limit = measure.product_rate(variant.dtype, jax.devices()[:1])
    run = jax.jit(step, donate_argnums=0)
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
        raise RuntimeError(f"The trace names no product of matrices, only {', '.join(operations) or 'nothing'}.")
    return {
        "ms": 1e3 * wall,
        "ms_in_operations": total,
        "shares": {name: milliseconds / total for name, milliseconds in kinds.items()},
        "limit_gflops": limit,
        "products_of_limit": gflop / kinds[PRODUCTS] * 1e3 / limit,
        "largest_ms": dict(operations.most_common(20)),
    }


def durations(trace: ProfileData) -> Counter[str]:
    """Time of each XLA operation in ms, by its name without the number. Operations that contain others are left out."""
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
    """The kind of an operation of that name."""
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), ELEMENTWISE)


def title(row: dict[str, Any]) -> str:
    """The variant of a row in words."""
    return f"{row['workload']}, {'second' if row['order'] == 2 else 'first'} order"


def summary(row: dict[str, Any]) -> str:
    """One row as a line."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in row["shares"].items())
    rate = f"products at {row['products_of_limit']:.0%} of the limit"
    return f"{title(row)}, {row['ms']:.3g} ms with the trace: {shares}; {rate}"


if __name__ == "__main__":
    command_line.run(Config, prepare, main, small=True)
