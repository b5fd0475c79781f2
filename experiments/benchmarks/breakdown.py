"""Where the time of a meta-step goes, by the kind of operation, from a trace of one that has been compiled.

    python -m experiments.benchmarks.breakdown --workloads omniglot-20w1s miniimagenet-5w1s

What is not a product of matrices or a convolution keeps a meta-step from the machine's limit, and so does the rate of
those that are. On one core, so that no two operations share the time. Prints shares, and writes results.json and
shares.png.
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
"""Words in the names that XLA gives to operations; the first kind that has one. The rest works on each entry alone."""
ELEMENTWISE = "each entry alone"
CONTAINERS = ("while", "call", "conditional")
"""These take the time of what is in them."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Traces one meta-step of each workload."""

    workloads: tuple[WorkloadName, ...] = ("omniglot-5w1s", "omniglot-20w1s", "miniimagenet-5w1s")
    """Models and tasks."""
    orders: tuple[Literal[1, 2], ...] = (2, 1)
    """Second and first order."""
    workdir: Path | None = None
    """Where the results go; default: a new directory below runs/."""


def prepare(config: Config) -> Config:
    """Checks the options. Raises ValueError or OSError, saying what is wrong and what to do."""
    for name in ("workloads", "orders"):
        if not getattr(config, name):
            raise ValueError(f"{name} must name at least one, but got none.")
    RunDirectory.check(config.workdir)
    return config


def main(config: Config) -> dict[str, Any]:
    """Traces, and returns what it writes to `results.json`."""
    run = RunDirectory(config.workdir, "breakdown")
    print(f"Writing to {run.path}", flush=True)
    rows = []
    for workload in config.workloads:
        for order in config.orders:
            found = breakdown(measure.Variant(workload, order, devices=1))
            rows.append({"workload": workload, "order": order, **found})
            print(told(rows[-1]), flush=True)
    results = {"config": dataclasses.asdict(config), "device": jax.devices()[0].device_kind, "rows": rows}
    path = run.write_results(results)
    plots.shares(run.path / "shares.png", {title(row): row["shares"] for row in rows}, "a meta-step's time")
    print(f"Wrote {path}, and shares.png beside it.")
    return results


def breakdown(variant: measure.Variant) -> dict[str, Any]:
    """Milliseconds of a meta-step, and by operation; the shares of the kinds; and how fast the products were.

    Raises:
      RuntimeError: if the trace has no product of matrices under a name that is known here.
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
    """Milliseconds of each operation of XLA, under its name without its number, what contains others left out."""
    found: Counter[str] = Counter()
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")  # A GPU's kernels have names of their own.
                name = str(operation).split(".")[0]
                if operation and name not in CONTAINERS:
                    found[name] += event.duration_ns / 1e6
    return found


def kind(name: str) -> str:
    """The kind of an operation of that name."""
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), ELEMENTWISE)


def title(row: dict[str, Any]) -> str:
    """What a row is of, in words."""
    return f"{row['workload']}, {'second' if row['order'] == 2 else 'first'} order"


def told(row: dict[str, Any]) -> str:
    """One row as a line."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in row["shares"].items())
    rate = f"products at {row['products_of_limit']:.0%} of the limit"
    return f"{title(row)}, {row['ms']:.3g} ms with the trace: {shares}; {rate}"


if __name__ == "__main__":
    command_line.run(Config, prepare, main, small=True)
