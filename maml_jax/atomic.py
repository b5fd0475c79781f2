"""Atomic replacement of files."""

import contextlib
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside `path`, which replaces `path` when the block ends without an error.

    A reader sees either the old content or the new content, never a part of the new content, also after a power
    failure. Of two writers, the last wins. After an error the temporary file is deleted and `path` is unchanged. The
    new file has the permissions of the old file. A link at `path` is replaced, and its target is unchanged. Missing
    parent directories are created.

    Raises:
      OSError: if the file cannot be written.

    Example:
      >>> import pathlib, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> with write_atomically(folder / "numbers.txt") as file:
      ...     _ = file.write(b"1 2 3")
      >>> [path.name for path in folder.iterdir()]
      ['numbers.txt']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "xb") as file:
            yield file
            if path.is_file() and not path.is_symlink():
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    # The new name is on disk when the directory is.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
