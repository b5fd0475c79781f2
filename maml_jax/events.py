"""Metrics for TensorBoard: a copy of `metrics.jsonl`, which stays what counts."""

import re
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FLUSH_SECONDS = 5.0
"""How long a row may wait before it is written out."""


class Events:
    """Event files in a folder, one for each training; a scalar for every number of a row, at its `step`.

    They are made anew from the rows that there are, so that after a run was killed, and went on from an
    earlier step, nothing is missing and nothing is there twice.

    Args:
      folder: replaced by what is written.
      rows: those logged so far. What is text in a row, and its `seed`, tells one training from others.

    Raises:
      OSError: as does `add`, if they cannot be written.
    """

    def __init__(self, folder: Path, rows: Iterable[dict[str, Any]]):
        if folder.exists():
            shutil.rmtree(folder)
        self._folder = folder
        self._writers: dict[str, Any] = {}
        self._flushed = time.monotonic()
        for row in rows:
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Writes the numbers of a row; one without a `step` is none of training, and left out."""
        # Its writer, and not its `SummaryWriter`, whose thread would wait for ever for a disk that is full.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        if "step" not in row:
            return
        labels, numbers = training_of(row)
        name = re.sub(r"[^\w=-]+", "_", "-".join(labels))[:100]
        if name not in self._writers:
            (self._folder / name).mkdir(parents=True, exist_ok=True)
            self._writers[name] = EventsWriter(str(self._folder / name / "events"))
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()]
        event = Event(wall_time=time.time(), step=int(row["step"]), summary=Summary(value=values))
        self._writers[name].write_event(event)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes out what is not on disk yet."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}


def training_of(row: Mapping[str, Any]) -> tuple[list[str], dict[str, float]]:
    """What tells the training of a row from others of its run, text and `seed`; and its numbers but the step."""
    labels = [value for value in row.values() if isinstance(value, str)]
    labels += [f"seed {row['seed']}"] if "seed" in row else []
    numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
    return labels, {key: value for key, value in numbers.items() if key not in ("step", "seed")}
