"""What a run leaves behind: metrics while it runs, results and parameters at its end, and a sign of life."""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "pillow", "tensorflow-datasets")


class RunDirectory:
    """A new directory for one run: `metrics.jsonl`, `results.json`, `params.msgpack` and pictures.

    Args:
      path: where; None takes the first free of `runs/NAME`, `runs/NAME-2`, ...
      name: what the run is.

    Raises:
      FileExistsError: if `path` already holds a run, so that none is overwritten.
    """

    def __init__(self, path: str | Path | None, name: str):
        self.path = _free_path(name) if path is None else Path(path)
        self.check_free(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._metrics = self.path / "metrics.jsonl"
        self._metrics.touch(exist_ok=False)
        self._made_by = provenance()  # Now: the checkout may have moved on by the end of the run.

    @staticmethod
    def check_free(path: str | Path | None) -> None:
        """Raises FileExistsError if `path` already holds a run."""
        if path is not None and (Path(path) / "metrics.jsonl").exists():
            raise FileExistsError(f"{path} already holds a run. Give another --workdir, or move that one away.")

    def log(self, **row: Any) -> None:
        """Appends one line to `metrics.jsonl`."""
        with open(self._metrics, "a") as file:
            file.write(json.dumps(_plain(row)) + "\n")

    def write_results(self, results: dict[str, Any]) -> Path:
        """Writes `results.json`: the results, and what made them."""
        text = json.dumps(_plain({"made_by": {**self._made_by, "finished": _now()}, **results}), indent=1)
        return self._replace("results.json", text.encode())

    def write_params(self, params: Any) -> Path:
        """Writes `params.msgpack`, which `flax.serialization.from_bytes(params, data)` reads."""
        from flax import serialization

        return self._replace("params.msgpack", serialization.to_bytes(params))

    def write_state(self, state: Any) -> Path:
        """Writes `state.msgpack`, all that training needs to go on: `flax.serialization.from_bytes(state, data)`."""
        from flax import serialization

        return self._replace("state.msgpack", serialization.to_bytes(state))

    def _replace(self, name: str, content: bytes) -> Path:
        target, part = self.path / name, self.path / f".{name}.part"
        part.write_bytes(content)
        os.replace(part, target)
        return target


def _free_path(name: str) -> Path:
    number = 1
    while (path := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path


def provenance() -> dict[str, Any]:
    """The command, commit, versions and hardware of this process."""
    module = getattr(sys.modules["__main__"].__spec__, "name", None)
    program = ["python", "-m", module] if module else ["python", Path(sys.argv[0]).name]
    device = jax.devices()[0]
    return {
        "command": shlex.join([*program, *sys.argv[1:]]),
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
        "hardware": f"{len(jax.devices())} x {device.device_kind} ({_processor()}, {os.cpu_count()} cores)",
        "started": _now(),
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _commit() -> str | None:
    """The commit of the checkout that this package lies in, with '+changes' if it is not clean."""
    here = Path(__file__)

    def git(*args: str) -> str:
        command = ["git", "-C", str(here.parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # Installed into another project's checkout: not its commit.
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _plain(tree: Any) -> Any:
    """Arrays as lists and paths as strings, so that JSON takes them; NaN and infinity as null, which JSON lacks."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_plain(value) for value in tree]
    if isinstance(tree, (np.ndarray, np.generic, jax.Array)):
        return _plain(np.asarray(tree).tolist())
    if isinstance(tree, float):
        return tree if np.isfinite(tree) else None
    return str(tree) if isinstance(tree, Path) else tree


class Progress:
    """Shows how far a run is, how fast, and how long it still takes: a bar on a terminal, else plain lines.

    Args:
      total: steps of the run.
      name: what is counted.
      every: seconds between plain lines.
    """

    def __init__(self, total: int, name: str, every: float = 15.0):
        from tqdm import tqdm

        self._total, self._name, self._every = total, name, every
        self._bar = tqdm(total=total, desc=name, unit="step", disable=not sys.stderr.isatty())
        self._start = self._shown = time.monotonic()
        self._first: tuple[int, float] | None = None

    def update(self, step: int, **values: float) -> None:
        """Reports that `step` steps are done, with some values to show beside."""
        now = time.monotonic()
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._first is None:
            self._first = (step, now)  # The first call compiles: the rate is counted from its end.
        if not self._bar.disable:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._shown >= self._every or step == self._total:
            self._shown = now
            steps, seconds = step - self._first[0], now - self._first[1]
            rate = steps / seconds if steps else 0.0
            left = f"{_duration((self._total - step) / rate)} left" if rate else "rate not known yet"
            print(f"{self._name}: {step:,}/{self._total:,} steps, {rate:,.1f} a second, {left}, {shown}", flush=True)
        if step == self._total:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
