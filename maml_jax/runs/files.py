"""What every file of a work directory needs: one writer, whole files, and errors that name the place."""

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


class WorkdirError(OSError):
    """A work directory or what is in it cannot be used; the message says where, why, and what to do."""


class InUseError(WorkdirError):
    """Another process works in the directory."""


def note(text: str) -> None:
    """Tells on standard error what a run decided by itself."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def make_directory(path: Path) -> None:
    """Makes `path` and what is above it. Raises WorkdirError if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def write(path: Path, content: bytes) -> Path:
    """Writes a file in one piece: whoever reads it sees the old content or the new. Raises WorkdirError."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def cannot_write(path: Path, error: BaseException) -> WorkdirError:
    """The error to raise where writing `path` failed by `error`."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())[:1000]
    return WorkdirError(
        f"Cannot write {path}: {reason}. Make room or give the rights, then start the same command again, which goes "
        "on from the last checkpoint; or give another --workdir."
    )


class Lock:
    """Keeps every other process out of the directory `path` until it is closed or this process ends.

    The kernel lets go of it with the process, however that ends, so that none is ever left over.

    Raises:
      InUseError: naming the process that has the lock.
      WorkdirError: if nothing can be written there.
    """

    def __init__(self, path: Path):
        try:
            file = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise cannot_write(path / ".lock", error) from error
        self.close = weakref.finalize(self, os.close, file)
        """Lets others in."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(file, 1000).decode(errors="replace").strip() or "another process"
            self.close()
            advice = "Wait until it ends, end it, or give another --workdir."
            if holder.startswith(_self()):
                advice = "That is this process itself: close() what has it open, such as a RunDirectory, first."
            raise InUseError(f"{path} is in use by {holder}. {advice}") from error
        except OSError as error:
            note(f"{path} is on a file system without locks ({error.strerror}): see that only one run uses it.")
        try:
            os.ftruncate(file, 0)
            os.write(file, f"{_self()} since {now()}\n".encode())
        except OSError as error:
            self.close()
            raise cannot_write(path / ".lock", error) from error


def _self() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def read_json(path: Path) -> dict:
    """Reads a JSON object; raises WorkdirError naming the file if it is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{path} cannot be read: {error}. Restore it, or give another --workdir.") from error
    if not isinstance(content, dict):
        raise WorkdirError(f"{path} holds no JSON object. Restore it, or give another --workdir.")
    return content


def plain(tree: Any) -> Any:
    """Arrays as lists and paths as strings, so that JSON takes them; NaN and infinity as null, which JSON lacks."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [plain(value) for value in tree]
    if isinstance(tree, (np.ndarray, np.generic, jax.Array)):
        return plain(np.asarray(tree).tolist())
    if isinstance(tree, float):
        return tree if np.isfinite(tree) else None
    return str(tree) if isinstance(tree, Path) else tree


def now() -> str:
    """The time in UTC, to the second."""
    return utc(time.time())


def utc(seconds: float) -> str:
    """A time since the epoch, as text."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
