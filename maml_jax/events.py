"""Metrics for TensorBoard: a copy of `metrics.jsonl`, which stays what counts."""

import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


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
        for row in rows:
            self._write(row)
        for writer in self._writers.values():
            writer.flush()

    def add(self, row: dict[str, Any]) -> None:
        """Writes the numbers of a row; one without a `step` is none of training, and left out."""
        if (writer := self._write(row)) is not None:
            writer.flush()

    def _write(self, row: dict[str, Any]) -> Any:
        # Its writer, and not its `SummaryWriter`, whose thread would wait for ever for a disk that is full.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        if "step" not in row:
            return None
        labels = [value for value in row.values() if isinstance(value, str)]
        labels += [f"seed{row['seed']}"] if "seed" in row else []
        training = self._folder / "-".join(labels)
        if str(training) not in self._writers:
            training.mkdir(parents=True, exist_ok=True)
            self._writers[str(training)] = EventsWriter(str(training / "events"))
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        values = [Summary.Value(tag=key, simple_value=numbers[key]) for key in numbers if key not in ("step", "seed")]
        writer = self._writers[str(training)]
        writer.write_event(Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values)))
        return writer

    def close(self) -> None:
        """Closes the files."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}
