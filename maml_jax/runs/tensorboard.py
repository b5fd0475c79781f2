"""Metrics for TensorBoard: a copy of `metrics.jsonl`, which stays what counts."""

import re
import shutil
import struct
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
      OSError: as do `add` and `flush`, if they cannot be written.
    """

    def __init__(self, folder: Path, rows: Iterable[dict[str, Any]]):
        if folder.exists():
            shutil.rmtree(folder)
        self._folder = folder
        self._file = f"events.out.tfevents.{int(time.time())}"
        self._waiting: dict[Path, list[bytes]] = {}
        self._flushed = time.monotonic()
        for row in rows:
            self.add(row)
        self.flush()

    def add(self, row: dict[str, Any]) -> None:
        """Takes the numbers of a row, to be on disk soon; one without a `step` is none of training, and left out."""
        # Its messages, and not its `SummaryWriter`, whose thread would wait for ever for a disk that is full.
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        if "step" not in row:
            return
        labels, numbers = training_of(row)
        file = self._folder / re.sub(r"[^\w=-]+", "_", "-".join(labels))[:100] / self._file
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()]
        event = Event(wall_time=time.time(), step=int(row["step"]), summary=Summary(value=values))
        self._waiting.setdefault(file, []).append(_record(event))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes out what is not on disk yet."""
        from tensorboardX.proto.event_pb2 import Event

        for path, records in self._waiting.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                records.insert(0, _record(Event(wall_time=time.time(), file_version="brain.Event:2")))
            with open(path, "ab") as file:
                file.write(b"".join(records))
        self._waiting = {}
        self._flushed = time.monotonic()


def _record(event: Any) -> bytes:
    """As in the files of TensorFlow: the length, the message, and a checksum of each."""
    from tensorboardX.record_writer import masked_crc32c

    message = event.SerializeToString()
    length = struct.pack("<Q", len(message))
    checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, message)]
    return length + checksums[0] + message + checksums[1]


def training_of(row: Mapping[str, Any]) -> tuple[list[str], dict[str, float]]:
    """What tells the training of a row from others of its run, text and `seed`; and its numbers but the step."""
    labels = [value for value in row.values() if isinstance(value, str)]
    labels += [f"seed {row['seed']}"] if "seed" in row else []
    numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
    return labels, {key: value for key, value in numbers.items() if key not in ("step", "seed")}
