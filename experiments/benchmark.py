"""Measures the time, memory and operations of a meta-step: second order, first order, and PyTorch.

    python -m experiments.benchmark
    python -m experiments.benchmark --workloads omniglot-5w1s --against func compiled jax
    python -m experiments.benchmark --workloads transformer --remat none full mixflow --inner-steps 1 4 16 32

Each measurement runs in a new process. The variants take turns for several rounds, so that other load on the machine
affects all of them. The command prints a table, and writes results.json and benchmark.png.
"""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments.benchmarks import workloads
from experiments.benchmarks.measure import Variant
from experiments.benchmarks.workloads import WORKLOADS, WorkloadName
from experiments.shared import command_line, plots
from experiments.shared.command_line import DefaultInHelp
from maml_jax import validation
from maml_jax.inner import Remat
from maml_jax.nets.convolution import ImplementationName
from maml_jax.parallel.backend import cores
from maml_jax.runs.directory import RunDirectory

Peer = Literal["loop", "func", "higher", "compiled", "compiled-loop", "jax"]
PEER_NAMES: dict[str, str] = {
    "loop": "PyTorch, loop over tasks",
    "func": "PyTorch, torch.func",
    "higher": "PyTorch, higher",
    "compiled": "PyTorch, torch.compile of torch.func",
    "compiled-loop": "PyTorch, torch.compile of a loop over tasks",
    "jax": "plain JAX",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures the meta-step of every combination of these options."""

    workloads: tuple[WorkloadName, ...] = WORKLOADS
    """Workloads. Each has a model and a meta-batch."""
    orders: tuple[Literal[1, 2], ...] = (2, 1)
    """Orders of the meta-gradient. 2: exact; 1: first-order approximation."""
    inner_steps: DefaultInHelp[tuple[int, ...]] = ()
    """Numbers of inner steps. Default: the paper's number for each workload."""
    remat: tuple[Remat, ...] = ("none",)
    """Rematerialisation of the inner steps in second order, see `maml_jax.sgd`."""
    task_batch_size: DefaultInHelp[tuple[int, ...]] = ()
    """Numbers of tasks that a device computes at once; 0: all tasks. Default: chosen by backend and model."""
    implementations: DefaultInHelp[tuple[ImplementationName, ...]] = ()
    """Implementations of the convolution. Default: chosen by backend and shapes."""
    dtypes: tuple[Literal["float32", "bfloat16", "float64"], ...] = ("float32",)
    """Data types of parameters and inputs."""
    devices: DefaultInHelp[tuple[int, ...]] = ()
    """Numbers of devices. Default: the largest number that shares the tasks evenly."""
    against: DefaultInHelp[tuple[Peer, ...]] = ()
    """Also measure the same meta-steps without this library. 'loop', 'func' and 'higher' are in PyTorch; 'compiled' and
    'compiled-loop' in torch.compile, with vmap or a loop over tasks; 'jax' in plain JAX. Default: no comparison."""
    peer_python: DefaultInHelp[Path | None] = None
    """Python executable with PyTorch. Default: the Python of this command."""
    rounds: int = 3
    """Number of measurements of each variant."""
    seconds: float = 3.0
    """Duration of each measurement in seconds."""
    workdir: DefaultInHelp[Path | None] = None
    """Directory of the results. Default: a new directory in runs/."""

    def variants(self) -> list[Variant]:
        """Returns all combinations of the options, each computation once."""
        product: Any = itertools.product(
            self.workloads,
            self.orders,
            self.inner_steps or (None,),
            self.remat,
            [count or "all" for count in self.task_batch_size] or (None,),
            self.implementations or (None,),
            self.dtypes,
            self.devices or (None,),
        )
        found: dict[Variant, None] = {}
        for values in product:
            variant = Variant(*values)
            if variant.order == 1:  # First order stores nothing of the inner steps: `remat` has no effect.
                variant = dataclasses.replace(variant, remat="none")
            if variant.workload not in workloads.IMAGES:  # The net has no convolutions.
                variant = dataclasses.replace(variant, implementation=None)
            found[variant] = None
        return list(found)

    def in_torch(self) -> list[Peer]:
        """Returns the peers that need PyTorch."""
        return [peer for peer in self.against if peer != "jax"]

    def check(self) -> None:
        """Raises ValueError if an option is not allowed."""
        for name in ("workloads", "orders", "remat", "dtypes"):
            if not getattr(self, name):
                raise ValueError(f"{name} must have at least one value, but got none.")
        for steps in self.inner_steps:
            validation.at_least("inner_steps", steps, 1)
        for count in self.task_batch_size:
            validation.at_least("task_batch_size", count, 0)
        for count in self.devices:
            validation.at_least("devices", count, 1)
        validation.at_least("rounds", self.rounds, 1)
        validation.positive("seconds", self.seconds)
        if self.peer_python is not None and not self.in_torch():
            raise ValueError(
                "peer_python names a Python with PyTorch, but PyTorch is not measured: add --against func."
            )


def prepare(config: Config) -> Config:
    """Checks the options.

    Raises:
      ValueError: if an option is not allowed, or PyTorch is missing.
      OSError: if the work directory holds another run, or cannot be written.
    """
    config.check()
    RunDirectory.check(config.workdir)
    if torch := config.in_torch():
        python = str(config.peer_python or sys.executable)
        try:
            subprocess.run([python, "-c", "import torch"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ValueError(
                f"{python} has no PyTorch. Install PyTorch with `pip install -e '.[torch]'`, or give another Python "
                "with --peer-python."
            ) from error
        if (backend := where()[0]) not in ("cpu", "gpu"):
            raise ValueError(
                f"PyTorch is measured on CPUs and GPUs, but the backend is {backend}: leave out {', '.join(torch)}."
            )
    if config.against and where()[0] != "cpu" and not config.devices:
        return dataclasses.replace(config, devices=(1,))  # The peers use one accelerator.
    return config


def main(config: Config) -> dict:
    """Runs the benchmark; returns the content of `results.json`."""
    jax.config.update("jax_platforms", "cpu")  # Only the measuring processes use the accelerator, one at a time.
    backend, device = where()
    run = RunDirectory(config.workdir, "benchmark", devices=device)
    print(f"Writing to {run.path}", flush=True)
    variants = config.variants()
    rows: list[dict[str, Any]] = [{"kind": "ours", **dataclasses.asdict(v), "rounds": []} for v in variants]
    if config.against:
        settings = dict.fromkeys((v.workload, v.order, v.inner_steps) for v in variants if v.workload != "transformer")
        for (workload, order, steps), peer in itertools.product(settings, config.against):
            row = {"kind": "peer", "peer": peer, "workload": workload, "order": order, "inner_steps": steps}
            rows.append({**row, "rounds": []})
    rows.sort(key=lambda row: (config.workloads.index(row["workload"]), -row["order"]))

    with tempfile.TemporaryDirectory() as compiled:
        for turn in range(config.rounds):
            for number, row in enumerate(rows):
                if row.get("error"):
                    continue
                outcome = one_round(config, row, compiled, backend)
                if "error" in outcome:
                    row["error"] = outcome["error"]
                else:
                    row["rounds"].append(outcome)
                run.log(**{key: value for key, value in row.items() if key != "rounds"} | outcome | {"round": turn})
                message = outcome.get("error") or f"{np.median(outcome['ms']):.3g} ms"
                done = turn * len(rows) + number + 1
                print(f"{done}/{config.rounds * len(rows)}  {title(row)}: {message}", flush=True)
    results: dict[str, Any] = {
        "config": dataclasses.asdict(config),
        "cores": cores(),
        "device": device,
        "rows": [summary(row) for row in rows],
    }
    results["ratios"] = ratios(results["rows"])
    print(table(results))
    path = run.write_results(results)
    print(f"Wrote {path}.")
    if any("ms" in row for row in results["rows"]):
        plots.benchmark(run.path / "benchmark.png", results["rows"], PEER_NAMES)
        print(f"Wrote {run.path / 'benchmark.png'}.")
    if any("error" in row for row in rows):
        raise SystemExit(1)
    return results


@cache
def where() -> tuple[str, str]:
    """Returns JAX's backend and a description of its devices. Another process asks JAX, so that this one holds none."""
    code = "import jax; d = jax.devices(); print(jax.default_backend()); print(len(d), 'x', d[0].device_kind)"
    command = [sys.executable, "-c", code]
    backend, device = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-2:]
    return backend, device


def one_round(config: Config, row: dict[str, Any], compiled: str, backend: str) -> dict[str, Any]:
    """Measures one row once, in a new process.

    Args:
      config: the options.
      row: a variant, or a peer.
      compiled: the folder of compiled programs.
      backend: JAX's backend. PyTorch runs on the same kind of device.

    Returns:
      The measurement, or `{"error": message}`.
    """
    keys = [field.name for field in dataclasses.fields(Variant)] if row["kind"] == "ours" else [
        "peer", "workload", "order", "inner_steps"]  # fmt: skip
    given = {key: row[key] for key in keys} | {"seconds": config.seconds}
    if row["kind"] == "ours":
        # Each row has a compilation cache. The first round fills the cache and measures the time of compilation.
        folder = os.path.join(compiled, title(row))
        command = [sys.executable, "-m", "experiments.benchmarks.measure", json.dumps({**given, "compiled": folder})]
    else:
        script = Path(__file__).parent / "benchmarks" / "torch_peers.py"
        given |= {"threads": cores(), "device": "cuda" if backend == "gpu" else "cpu"}
        command = [str(config.peer_python or sys.executable), str(script), json.dumps(given)]
        if row["peer"] == "jax":
            command = [sys.executable, "-m", "experiments.benchmarks.plain_jax", json.dumps(given)]
    root = str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(compiled, "torch"),  # The first round measures compilation, too.
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error" in line or "error" in line]
        return {"error": errors[-1] if errors else f"ended with status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row with the median, minimum and maximum over rounds. The time of a round is a median, too."""
    row = dict(row)
    rounds = row.pop("rounds")
    if not rounds or "error" in row:
        return row
    medians = [float(np.median(outcome["ms"])) for outcome in rounds]
    row |= {"ms": float(np.median(medians)), "ms_least": min(medians), "ms_most": max(medians)}
    if row["kind"] == "peer":
        row |= {key: rounds[0][key] for key in ("version", "compile_s")}
    if row["kind"] == "ours":
        row |= {key: rounds[0][key] for key in ("tasks", "compile_s", "memory_compiled", "memory_measured", "gflop")}
        row["devices_used"] = rounds[0]["devices_used"]
        row["limit_gflops"] = float(np.median([outcome["limit_gflops"] for outcome in rounds]))
        # Each round measured the limit too: divide within a round, then take the median.
        row["share_of_limit"] = float(
            np.median([o["gflop"] / np.median(o["ms"]) * 1e3 / o["limit_gflops"] for o in rounds])
        )
        row["tasks_per_second"] = 1e3 * row["tasks"] / row["ms"]
    return row


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compares each variant with first order and with the peers.

    Returns:
      For each measured variant: second order over first order in time, memory and operations, and the time of the
      fastest peer over ours.
    """
    found = []
    for row in (row for row in rows if row["kind"] == "ours" and "ms" in row):
        ratio: dict[str, Any] = {key: row[key] for key in ("workload", "order", "inner_steps", "remat")}
        ratio |= {key: row[key] for key in ("task_batch_size", "implementation", "dtype", "devices")}
        same = ("workload", "inner_steps", "task_batch_size", "implementation", "dtype", "devices")
        first = [o for o in rows if o["kind"] == "ours" and o["order"] == 1 and "ms" in o
                 and all(o[key] == row[key] for key in same)]  # fmt: skip
        if row["order"] == 2 and first:
            ratio["second_over_first"] = {
                "time": row["ms"] / first[0]["ms"],
                "operations": row["gflop"] / first[0]["gflop"],
                "memory": row["memory_compiled"] / first[0]["memory_compiled"] if row["memory_compiled"] else None,
            }
        peers = [o for o in rows if o["kind"] == "peer" and "ms" in o and row["dtype"] == "float32"
                 and all(o[key] == row[key] for key in ("workload", "order", "inner_steps"))]  # fmt: skip
        if peers:
            best = min(peers, key=lambda peer: peer["ms"])
            ratio["best_peer"], ratio["best_peer_over_ours"] = best["peer"], best["ms"] / row["ms"]
        found.append(ratio)
    return found


def title(row: dict[str, Any]) -> str:
    """Describes the variant of a row."""
    parts = [row["workload"], "second order" if row["order"] == 2 else "first order"]
    parts += [f"{row['inner_steps']} inner steps"] if row["inner_steps"] else []
    if row["kind"] == "peer":
        return ", ".join([*parts, PEER_NAMES[row["peer"]]])
    parts += [f"remat {row['remat']}"] if row["remat"] != "none" else []
    parts += [f"task batches of {row['task_batch_size']}"] if row["task_batch_size"] else []
    parts += [row["implementation"]] if row["implementation"] else []
    parts += [row["dtype"]] if row["dtype"] != "float32" else []
    parts += [f"{row['devices']} devices"] if row["devices"] else []
    return ", ".join(parts)


def table(results: dict) -> str:
    """Formats the times, the memory, the shares of the machine's limit, and the ratios."""
    width = max(len(title(row)) for row in results["rows"])
    columns = "   ms per meta-step (min - max)    tasks/s  compile s    MB/device  MB measured     GFLOP of limit"
    lines = ["", " " * width + columns]
    for row in results["rows"]:
        if "ms" not in row:
            lines.append(f"{title(row):{width}}   {row.get('error', 'not measured')}")
            continue
        line = f"{title(row):{width}}   {row['ms']:9.3f} ({row['ms_least']:.3f} - {row['ms_most']:.3f})"
        if row["kind"] == "ours":
            line = f"{line:{width + 33}} {row['tasks_per_second']:8.0f} {row['compile_s']:10.1f}"
            line += (
                f" {(row['memory_compiled'] or np.nan) / 1e6:12.1f} {(row['memory_measured'] or np.nan) / 1e6:12.1f}"
            )
            line += f" {row['gflop']:9.2f} {row['share_of_limit']:8.0%}"
        else:
            line = f"{line:{width + 42}} {row['compile_s']:10.1f}"
        lines.append(line)
    lines.append("")
    for row, ratio in zip((row for row in results["rows"] if row["kind"] == "ours" and "ms" in row), results["ratios"]):
        parts = []
        if over := ratio.get("second_over_first"):
            parts.append(f"second over first order: time {over['time']:.2f}, operations {over['operations']:.2f}")
            parts[-1] += f", memory {over['memory']:.2f}" if over["memory"] else ""
        if "best_peer" in ratio:
            parts.append(f"{ratio['best_peer_over_ours']:.2f} times as fast as {PEER_NAMES[ratio['best_peer']]}")
        if parts:
            lines.append(f"{title(row)}: {'; '.join(parts)}")
    return "\n".join(lines)


if __name__ == "__main__":
    command_line.run(Config, prepare, main)
