"""Loggers that copy metrics to TensorBoard and Weights & Biases. `metrics.jsonl` is the complete record."""

import hashlib
import importlib.util
import shutil
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from maml_jax.runs.files import WorkdirError, folder_name

FLUSH_SECONDS = 5.0
"""Seconds between writes of the event files of TensorBoard."""


class Logger(Protocol):
    """Copies metrics to another tool. A method may raise any error; `RunDirectory` then removes the logger."""

    name: str
    """The name of the tool in messages."""

    def log(self, row: dict[str, Any]) -> None:
        """Adds a row that was appended to `metrics.jsonl`. Rows without a `step` are ignored."""

    def restart(self) -> None:
        """Is called after rows were removed from `metrics.jsonl`."""

    def close(self) -> None:
        """Writes all rows that were added, and ends the logger."""


class TensorBoardLogger:
    """Writes event files for TensorBoard. Each training has a folder, and each number of a row is a scalar at `step`.

    The first `log`, and the first `log` after `restart`, writes the folder again from all rows. After a run resumed
    from an earlier step, no point is therefore missing or repeated.

    Args:
      folder: the folder of the event files, whose content is replaced.
      rows: a function that returns all rows of `metrics.jsonl`. The strings and the `seed` of a row identify the
        training.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, rows: Callable[[], list[dict[str, Any]]]):
        self._folder, self._rows = folder, rows
        self._buffer: dict[Path, list[bytes]] = {}
        self._file: str | None = None  # The name of the event files; None until the folder is written.
        self._flushed = 0.0

    def log(self, row: dict[str, Any]) -> None:
        """Adds a row. Rows are written when the last write was `FLUSH_SECONDS` ago, and by `close`.

        Raises:
          OSError: if the event files cannot be written.
        """
        if self._file is not None:
            self._add(row)
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._flush()
            return
        if self._folder.exists():
            shutil.rmtree(self._folder)
        self._file = f"events.out.tfevents.{int(time.time())}"
        for earlier in self._rows():
            self._add(earlier)
        self._flush()

    def restart(self) -> None:
        """Writes the folder again at the next `log`."""
        self.close()
        self._file = None

    def close(self) -> None:
        """Writes the rows that are not on disk yet.

        Raises:
          OSError: if the event files cannot be written.
        """
        self._flush()

    def _add(self, row: dict[str, Any]) -> None:
        # Use the messages of tensorboardX, but not `SummaryWriter`: its thread hangs when the disk is full.
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        if "step" not in row:
            return
        labels, numbers = labels_and_numbers(row)
        path = self._folder / folder_name(labels) / str(self._file)
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()]
        event = Event(wall_time=time.time(), step=int(row["step"]), summary=Summary(value=values))
        self._buffer.setdefault(path, []).append(_record(event))

    def _flush(self) -> None:
        from tensorboardX.proto.event_pb2 import Event

        for path, records in self._buffer.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                records.insert(0, _record(Event(wall_time=time.time(), file_version="brain.Event:2")))
            with open(path, "ab") as file:
                file.write(b"".join(records))
        self._buffer = {}
        self._flushed = time.monotonic()


class WandBLogger:
    """Logs to a run of Weights & Biases. This run resumes when the run of the directory resumes.

    After a run was killed, some rows are logged twice, with equal values. Both copies appear in Weights & Biases.

    Args:
      project: the name of the project.
      folder: the run directory, where the package `wandb` keeps its files.
      run: the content of `run.json`: name, configuration and starts.

    Raises:
      WorkdirError: if `wandb` cannot start, for example without an account.
    """

    name = "Weights & Biases"

    def __init__(self, project: str, folder: Path, run: dict[str, Any]):
        import wandb

        self._defined: set[str] = set()
        identity = f"{folder.absolute()} {run['starts'][0]['started']}"
        try:
            self._run = wandb.init(
                project=project,
                name=run["name"],
                id=hashlib.sha256(identity.encode()).hexdigest()[:16],
                dir=folder,
                config={**(run["config"] or {}), "made_by": run["starts"][-1]},
                resume="allow",
            )
        except wandb.Error as error:
            raise WorkdirError(
                f"Weights & Biases cannot start: {error}. Log in (`wandb login`), set WANDB_MODE=offline, or leave out "
                "--wandb."
            ) from error

    def log(self, row: dict[str, Any]) -> None:
        """Logs the numbers of a row. The x-axis is the `step` of its training."""
        if "step" not in row:
            return
        labels, numbers = labels_and_numbers(row)
        prefix = "".join(f"{label}/" for label in labels)
        if prefix not in self._defined:
            self._defined.add(prefix)
            self._run.define_metric(f"{prefix}step")
            self._run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")
        self._run.log({f"{prefix}{name}": value for name, value in {**numbers, "step": row["step"]}.items()})

    def restart(self) -> None:
        """Does nothing: rows that were sent cannot be removed."""

    def close(self) -> None:
        """Sends all rows and ends the run."""
        self._run.finish()


def check_wandb(project: str | None) -> None:
    """Raises ValueError if `project` is given and the package `wandb` is not installed."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"wandb {project} needs the package wandb: pip install wandb, or leave out --wandb.")


def labels_and_numbers(row: Mapping[str, Any]) -> tuple[list[str], dict[str, float]]:
    """Splits a row into the labels that name its training and its metrics.

    Returns:
      The labels: the strings and the `seed` of the row. The metrics: the numbers of the row without `step` and `seed`.

    Example:
      >>> labels_and_numbers({"method": "maml", "seed": 3, "step": 10, "loss": 0.5})
      (['maml', 'seed 3'], {'loss': 0.5})
    """
    labels = [value for value in row.values() if isinstance(value, str)]
    labels += [f"seed {row['seed']}"] if "seed" in row else []
    numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
    return labels, {key: value for key, value in numbers.items() if key not in ("step", "seed")}


def _record(event: Any) -> bytes:
    """Encodes a message in the format of TensorFlow: length, checksum of length, message, checksum of message."""
    from tensorboardX.record_writer import masked_crc32c

    message = event.SerializeToString()
    length = struct.pack("<Q", len(message))
    checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, message)]
    return length + checksums[0] + message + checksums[1]
