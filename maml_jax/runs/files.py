"""Files of a run directory: atomic writes with errors that name the file, locks, JSON and times."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import sys
import time
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import numpy as np

from maml_jax.atomic import write_atomically

WITHOUT_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems that cannot lock a file or a directory."""


class WorkdirError(OSError):
    """A run directory or one of its files cannot be used. The message names the file, the reason and what to do."""


class InUseError(WorkdirError):
    """Another process uses the directory."""


def print_note(text: str) -> None:
    """Prints `note: TEXT` on standard error. Notes report decisions of the run, such as the removal of rows.

    A note that cannot be written, for example because standard error is closed, is left out: a run goes on without it.
    """
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
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

    The lock is on the directory itself and on the file `.lock` in it, which names the process. The removal of the file
    does not release the lock. File systems that lock no directories, such as NFS, lock the file alone. The kernel
    releases the lock when the process ends, even by a signal, so no stale lock remains.

    Raises:
      InUseError: if another process holds the lock; the message names the process.
      WorkdirError: if the lock file cannot be written.
    """

    def __init__(self, path: Path):
        try:
            file = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
            directory = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise write_error(path / ".lock", error) from error
        self.close = weakref.finalize(self, _close_all, directory, file)
        """Releases the lock."""
        try:
            if not _lock_all(path, directory, file):
                print_note(f"{path} is on a file system without locks: only one run may use it.")
            os.ftruncate(file, 0)
            os.write(file, f"{_this_process()} since {now()}\n".encode())
        except InUseError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise write_error(path / ".lock", error) from error

    @staticmethod
    def check(path: Path) -> None:
        """Raises InUseError if another process holds the lock on `path`. No file is written."""
        files = [path, *([path / ".lock"] if (path / ".lock").exists() else [])]
        descriptors = [os.open(file, os.O_RDONLY) for file in files]
        try:
            _lock_all(path, *descriptors, kind=fcntl.LOCK_SH)
        finally:
            _close_all(*descriptors)


def _lock_all(path: Path, *descriptors: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Locks files that the file system can lock, and returns whether there is such a file.

    Raises:
      InUseError: if another process holds a lock.
    """
    locked = False
    for descriptor in descriptors:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError as error:
            lines = (path / ".lock").read_text(errors="replace") if (path / ".lock").exists() else ""
            holder = lines.strip()[:1000] or "another process"
            advice = "Wait until the process ends, end the process, or give another --workdir."
            if holder.startswith(_this_process()):
                advice = "The holder is this process: first close() the object with the lock, such as a RunDirectory."
            raise InUseError(f"{path} is in use by {holder}. {advice}") from error
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
    return locked


def _close_all(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def read_json(path: Path) -> dict:
    """Reads a file that holds a JSON object.

    Raises:
      WorkdirError: if the file cannot be read or does not hold a JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
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


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts values to the types that `json.loads` returns.

    Example:
      >>> as_json({"sizes": (1, 2)})
      {'sizes': [1, 2]}
    """
    return json.loads(json.dumps(to_jsonable(dict(values))))


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns `{name: (old, new)}` for the entries that differ. A missing entry has the value 'absent'.

    Example:
      >>> differences({"rate": 0.1, "steps": 5}, {"rate": 0.1, "seed": 0})
      {'seed': ('absent', 0), 'steps': (5, 'absent')}
    """
    pairs = {name: (old.get(name, "absent"), new.get(name, "absent")) for name in sorted({*old, *new})}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def folder_name(labels: Iterable[Any]) -> str:
    """Returns a name of a folder for labels: the labels with hyphens between them.

    Hyphens inside labels and characters with a meaning in paths are encoded as in addresses of the web, so different
    labels have different names, and every name is one folder.

    Example:
      >>> folder_name(["maml", 0]), folder_name(["a-b", "../c"])
      ('maml-0', 'a%2Db-%2E.%2Fc')
    """
    encoded = (quote(str(label), safe=" +=,").replace("-", "%2D") or "%" for label in labels)
    name = "-".join(f"%2E{each[1:]}" if each.startswith(".") else each for each in encoded)
    # File systems allow names of 255 bytes.
    return name if len(name) <= 200 else f"{name[:180]}%{hashlib.sha256(name.encode()).hexdigest()[:16]}"


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
