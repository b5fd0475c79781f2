"""What all image data on disk share: the error, and the cache of what was read and resized once."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

Arrays = Mapping[str, np.ndarray]


class DataError(Exception):
    """The data cannot be used; the message names the file or folder and says what to do."""


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/maml_jax`, or `~/.cache/maml_jax`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maml_jax"


def read(path: Path, digest: Callable[[Arrays], str]) -> dict[str, np.ndarray] | None:
    """The cached arrays, or None if there are none or they are damaged, so that they are made again.

    Args:
      path: the file that `write` wrote.
      digest: the content hash of the arrays, which has to be the `sha256` they were written with.
    """
    try:
        with open(path, "rb") as file, np.load(file) as stored:
            arrays = dict(stored)
            whole = str(arrays["sha256"]) == digest(arrays)
    except FileNotFoundError:
        return None
    except PermissionError:
        raise
    except Exception as error:  # A flipped bit can surface as nearly anything in the readers of ZIP and NPY.
        print(f"The cache {path} is damaged ({error}) and is built again.")
        return None
    if not whole:
        print(f"The cache {path} does not match its checksum and is built again.")
        return None
    return arrays


def write(path: Path, arrays: Arrays) -> None:
    """Writes beside the target and renames, so that no reader ever sees a part of it.

    Args:
      path: where; folders are made as needed.
      arrays: what to keep, with their content hash as text in `sha256`.

    Raises:
      DataError: if it cannot be written, as on a full disk; nothing is left of it then.
    """
    size = sum(array.nbytes for array in arrays.values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False) as file:
            try:
                np.savez(file, **arrays)  # type: ignore[arg-type]
                file.close()
                os.chmod(file.name, 0o644)  # Temporary files are private, but a cache may be shared.
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise DataError(
            f"The cache {path} cannot be written ({error}). It needs {size / 1e6:,.0f} MB: make room there, or give "
            "another --cache-dir."
        ) from error
