"""Checks, measures and trains on an accelerator. On an H100 the training takes eight minutes.

    python -m experiments.accelerator --data-dir data/omniglot
    python -m experiments.accelerator --stages measure

The stage `measure` checks the second derivatives in float64, compares the meta-gradients in each precision with
float64, measures all workloads and PyTorch, and divides the time among kinds of operations. Each job is a process. Some
jobs compile at the same time. Afterwards all jobs use the accelerator one after the other. The stage `train` trains
20-way 1-shot Omniglot by the paper's recipe. A training that the time limit has stopped resumes with `--stages train`.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

from experiments.benchmark import where
from experiments.shared import command_line
from experiments.shared.command_line import DefaultInHelp
from maml_jax import validation
from maml_jax.parallel.backend import cores
from maml_jax.runs.directory import RunDirectory

Stage = Literal["measure", "train"]
WORKLOADS = ("sinusoid", "omniglot-5w1s", "omniglot-5w5s", "omniglot-20w1s", "omniglot-20w5s", "miniimagenet-5w1s",
             "miniimagenet-5w5s")  # fmt: skip
MAIN = ("omniglot-5w1s", "omniglot-20w1s", "miniimagenet-5w1s")
"""Workloads that are measured in every precision."""
PEERS = ("loop", "func", "compiled")
CORES_PER_JOB = 4
"""Processor cores for the compilation of a job. On an H100 with 16 cores, 46 jobs at the same time did not compile in
two minutes."""
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32"},
    "tf32": {"precision": "tensorfloat32"},
    "bfloat16": {"dtype": "bfloat16"},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Checks, measures and trains on an accelerator."""

    stages: tuple[Stage, ...] = ("measure", "train")
    """Stages to run."""
    seconds: float = 0.5
    """Duration of each measurement in seconds."""
    compile_seconds: float = 240.0
    """Time limit of the compilation. Jobs that have not finished by then are not measured."""
    train_seconds: float = 540.0
    """Time limit of the training. A stopped training resumes from its last checkpoint."""
    data_dir: Path = Path("data/omniglot")
    """Folder of Omniglot, as for experiments.omniglot."""
    cache_dir: DefaultInHelp[Path | None] = None
    """Folder for resized images. Default: as for experiments.omniglot."""
    workdir: DefaultInHelp[Path | None] = None
    """Directory of the measurements. Default: a new directory in runs/."""
    train_workdir: Path = Path("runs/accelerator-omniglot-20w1s")
    """Directory of the training."""


def jobs(seconds: float, torch: bool) -> list[dict[str, Any]]:
    """Returns the options of all jobs of the stage `measure`, for the worker or for PyTorch (with `peer`).

    The first jobs are the most important, because the time of compilation is limited.
    """
    tf32 = PRECISIONS["tf32"] | {"devices": 1}
    timed = {"job": "measure", "seconds": seconds, "devices": 1}
    found: list[dict[str, Any]] = [timed | {"workload": workload} | tf32 for workload in MAIN]
    if torch:
        found += [
            {"peer": peer, "workload": workload, "seconds": seconds}
            for workload, peer in itertools.product((*MAIN, "sinusoid"), PEERS)
        ]
    found += [{"job": "exactness", "implementation": "im2col", "pooled": pooled} for pooled in (False, True)]
    found += [{"job": "error", "workload": "omniglot-5w1s", "devices": 1, **each} for each in PRECISIONS.values()]
    found += [
        timed | {"workload": workload} | PRECISIONS[name] for workload in MAIN for name in ("float32", "bfloat16")
    ]
    found += [{"job": "breakdown", "workload": workload, **tf32} for workload in MAIN]
    found += [timed | {"workload": workload, "order": 1} | tf32 for workload in MAIN]
    found += [timed | {"workload": workload} | tf32 for workload in WORKLOADS if workload not in MAIN]
    found += [timed | {"workload": workload, "implementation": "lax"} | tf32 for workload in MAIN]
    found += [
        {"job": "exactness", "implementation": implementation, "pooled": pooled}
        for implementation, pooled in itertools.product(("lax", "patches"), (False, True))
    ]
    return found


class Job:
    """A job, in a process of its own after `compile`."""

    def __init__(self, options: dict[str, Any], log: Path, backend: str):
        self.options, self.log = options, log
        if "peer" in options:
            script = str(Path(__file__).parent / "benchmarks" / "torch_peers.py")
            device = "cuda" if backend == "gpu" else "cpu"
            given = options | {"device": device, "threads": cores(), "wait": True}
            self.command = [sys.executable, script, json.dumps(given)]
        else:
            self.command = [sys.executable, "-m", "experiments.benchmarks.worker", json.dumps(options)]
        self.process: subprocess.Popen[str] | None = None
        self.ready = self.stopped = False

    def compile(self, end: float) -> None:
        """Starts the process, unless the time is after `end`, and waits until the job is ready or has failed."""
        if time.monotonic() > end:
            return
        root = str(Path(__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # The processes share the memory of the accelerator.
            "TORCHINDUCTOR_COMPILE_THREADS": str(CORES_PER_JOB),
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        assert self.process.stdout is not None
        self.ready = any(line.strip() == "ready" for line in iter(self.process.stdout.readline, ""))
        if not self.ready:
            self.process.communicate()

    def stop(self) -> None:
        """Ends the process if the job is not ready."""
        if self.process is not None and not self.ready and self.process.poll() is None:
            self.stopped = True
            self.process.kill()

    def result(self, timeout: float) -> dict[str, Any]:
        """Lets the job use the accelerator; returns its result or `{"error": message}`."""
        if self.process is None or self.stopped:
            return {"error": "not compiled: the time was up"}
        if not self.ready:
            return {"error": f"not compiled: {self._failure()}"}
        try:
            out, _ = self.process.communicate("\n", timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return {"error": f"not finished within {timeout:.0f} s"}
        if self.process.returncode:
            return {"error": self._failure()}
        return json.loads(out.splitlines()[-1])

    def _failure(self) -> str:
        assert self.process is not None
        lines = self.log.read_text().strip().splitlines()
        return lines[-1] if lines else f"ended with status {self.process.returncode}"


def measure(config: Config, run: RunDirectory) -> list[dict[str, Any]]:
    """Runs the jobs; returns the options of each job with its result."""
    backend, _ = where()
    torch = backend in ("cpu", "gpu")  # PyTorch runs on the same kind of device.
    torch = torch and subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode == 0
    logs = run.path / "logs"
    logs.mkdir(exist_ok=True)
    found = [Job(job, logs / f"{number}.log", backend) for number, job in enumerate(jobs(config.seconds, torch))]
    print(f"{len(found)} jobs compile.", flush=True)
    end = time.monotonic() + config.compile_seconds
    with concurrent.futures.ThreadPoolExecutor(max(1, cores() // CORES_PER_JOB)) as pool:
        compiling = [pool.submit(job.compile, end) for job in found]
        concurrent.futures.wait(compiling, config.compile_seconds)
        for job in found:
            job.stop()
    rows = []
    for number, job in enumerate(found, 1):
        rows.append(job.options | job.result(60.0))
        run.log(**rows[-1])
        print(f"{number}/{len(found)}  {line(rows[-1])}", flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """Describes a job and its result."""
    order = "first order" if row.get("order") == 1 else None
    words = [row.get("job", "PyTorch"), row.get("peer"), row.get("workload"), order, row.get("implementation")]
    words += ["pooled"] if row.get("pooled") else []
    name = " ".join(word for word in (*words, row.get("precision"), row.get("dtype")) if word)
    if "error" in row:
        return f"{name}: {row['error']}"
    if "gradient_error" in row:
        return f"{name}: relative error {row['gradient_error']:.1e}"
    if "exact" in row:
        return f"{name}: {'exact' if row['exact'] else 'NOT exact'}"
    if "shares" in row:
        return f"{name}: {', '.join(f'{kind} {share:.0%}' for kind, share in row['shares'].items())}"
    middle = statistics.median(row["ms"])
    rate = f", {row['gflop'] / middle:.3g} TFLOP/s of {row['limit_gflops'] / 1e3:.3g}" if "gflop" in row else ""
    return f"{name}: {middle:.3g} ms{rate}, compiled in {row['compile_s']:.0f} s"


def train(config: Config) -> int:
    """Trains 20-way 1-shot Omniglot by the paper's recipe until the end or the time limit; returns the exit status."""
    command = [sys.executable, "-m", "experiments.omniglot", "--ways", "20", "--shots", "1", "--data-dir",
               str(config.data_dir.resolve()), "--workdir", str(config.train_workdir.resolve())]  # fmt: skip
    if config.cache_dir is not None:
        command += ["--cache-dir", str(config.cache_dir.resolve())]
    # In a new session the training gets one SIGTERM, at which it saves its state, and no Ctrl-C before.
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], start_new_session=True)
    try:
        process.wait(config.train_seconds)
    except subprocess.TimeoutExpired:
        print("The time is over: the training saves its state and stops.", flush=True)
    finally:
        process.terminate()
        process.wait()
    return process.returncode


def prepare(config: Config) -> Config:
    """Checks the options.

    Raises:
      ValueError: if an option is not allowed, or the folder of Omniglot does not exist.
      OSError: if the work directory holds another run, or cannot be written.
    """
    if not config.stages:
        raise ValueError("stages must have at least one value, but got none.")
    for name in ("seconds", "compile_seconds", "train_seconds"):
        validation.positive(name, getattr(config, name))
    if "train" in config.stages and not config.data_dir.is_dir():
        raise ValueError(
            f"data_dir: {config.data_dir} does not exist, but the training needs Omniglot. "
            f"maml_jax.tasks.download.omniglot({str(config.data_dir)!r}) downloads Omniglot. --stages measure needs no "
            "data."
        )
    if "measure" in config.stages:
        RunDirectory.check(config.workdir)
    return config


def main(config: Config) -> dict[str, Any]:
    """Runs the stages; returns the content of `results.json` of the measurements, or an empty dict without them."""
    results: dict[str, Any] = {}
    if "measure" in config.stages:
        device = where()[1]
        run = RunDirectory(config.workdir, "accelerator", devices=device)
        print(f"Writing to {run.path}", flush=True)
        results = {"config": dataclasses.asdict(config), "device": device, "rows": measure(config, run)}
        print(f"Wrote {run.write_results(results)}.")
    if "train" in config.stages and (status := train(config)) not in (0, 143):
        raise SystemExit(status)
    return results


if __name__ == "__main__":
    command_line.run(Config, prepare, main)
