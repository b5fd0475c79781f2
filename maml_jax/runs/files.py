"""Files of a run directory: atomic writes with errors that name the file, locks, JSON and times."""

import fcntl
import json
import os
import socket
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maml_jax.atomic import write_atomically


class WorkdirError(OSError):
    """A run directory or one of its files cannot be used. The message names the file, the reason and what to do."""


class InUseError(WorkdirError):
    """Another process uses the directory."""


def print_note(text: str) -> None:
    """Prints `note: TEXT` on standard error. Notes report decisions of the run, such as the removal of rows."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def make_directory(path: Path) -> None:
    """Creates `path` and its missing parents.

    Raises:
      WorkdirError: if a directory cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


def write_file(path: Path, content: bytes) -> Path:
    """Replaces the content of a file atomically and returns `path`; see `write_atomically`.

    Raises:
      WorkdirError: if the file cannot be written.
    """
    try:
        with write_atomically(path) as file:
            file.write(content)
    except OSError as error:
        raise write_error(path, error) from error
    return path


def write_error(path: Path, error: BaseException) -> WorkdirError:
    """Returns the error to raise when writing `path` failed with `error`."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())[:1000]
    return WorkdirError(
        f"Cannot write {path}: {reason}. Free disk space or change the permissions, then start the same command again: "
        "the run resumes from the last checkpoint. Or give another --workdir."
    )


class Lock:
    """An exclusive lock on the directory `path`, held until `close` is called or this process ends.

    The kernel releases the lock when the process ends, even by a signal, so no stale lock remains.

    Raises:
      InUseError: if another process holds the lock; the message names the process.
      WorkdirError: if the lock file cannot be written.
    """

    def __init__(self, path: Path):
        try:
            file = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise write_error(path / ".lock", error) from error
        self.close = weakref.finalize(self, os.close, file)
        """Releases the lock."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(file, 1000).decode(errors="replace").strip() or "another process"
            self.close()
            advice = "Wait until the process ends, end the process, or give another --workdir."
            if holder.startswith(_this_process()):
                advice = "The holder is this process: first close() the object with the lock, such as a RunDirectory."
            raise InUseError(f"{path} is in use by {holder}. {advice}") from error
        except OSError as error:
            print_note(f"{path} is on a file system without locks ({error.strerror}): only one run may use it.")
        try:
            os.ftruncate(file, 0)
            os.write(file, f"{_this_process()} since {now()}\n".encode())
        except OSError as error:
            self.close()
            raise write_error(path / ".lock", error) from error


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def read_json(path: Path) -> dict:
    """Reads a file that holds a JSON object.

    Raises:
      WorkdirError: if the file cannot be read or does not hold a JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{path} cannot be read: {error}. Restore the file, or give another --workdir.") from error
    if not isinstance(content, dict):
        raise WorkdirError(f"{path} does not hold a JSON object. Restore the file, or give another --workdir.")
    return content


def to_jsonable(tree: Any) -> Any:
    """Converts nested dicts, lists and tuples to values that `json.dumps` accepts.

    Arrays become lists, paths become strings, and NaN and infinity become None, because JSON has no such numbers.

    Example:
      >>> to_jsonable({"loss": np.array([0.5, np.inf]), "path": Path("runs/mine")})
      {'loss': [0.5, None], 'path': 'runs/mine'}
    """
    if isinstance(tree, dict):
        return {key: to_jsonable(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [to_jsonable(value) for value in tree]
    if isinstance(tree, (np.ndarray, np.generic, jax.Array)):
        return to_jsonable(np.asarray(tree).tolist())
    if isinstance(tree, float):
        return tree if np.isfinite(tree) else None
    return str(tree) if isinstance(tree, Path) else tree


def now() -> str:
    """Returns the current time in UTC, to the second, in ISO 8601."""
    return utc(time.time())


def utc(seconds: float) -> str:
    """Formats seconds since the epoch in ISO 8601.

    Example:
      >>> utc(0)
      '1970-01-01T00:00:00Z'
    """
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
