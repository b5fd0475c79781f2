"""The cache of resized images, and `DataError`, the error that all readers of image data raise."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from maml_jax.atomic import write_atomically

Arrays = Mapping[str, np.ndarray]


class DataError(Exception):
    """The data cannot be used. The message names the file or folder and what to do."""


def default_folder() -> Path:
    """Returns the default cache folder: `$XDG_CACHE_HOME/maml_jax`, or `~/.cache/maml_jax` without that variable."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maml_jax"


def read(path: Path, digest: Callable[[Arrays], str]) -> dict[str, np.ndarray] | None:
    """Reads cached arrays. Returns None if the file is missing or damaged, and reports a damaged file.

    Args:
      path: a file that `write` wrote.
      digest: computes the content hash of the arrays, which must equal the stored array `sha256`.

    Raises:
      PermissionError: if this process may not read the file.
    """
    try:
        with open(path, "rb") as file, np.load(file) as stored:
            arrays = dict(stored)
            intact = str(arrays["sha256"]) == digest(arrays)
    except FileNotFoundError:
        return None
    except PermissionError:
        raise
    except Exception as error:  # The readers of ZIP and NPY raise almost any exception for a flipped bit.
        print(f"The cache {path} is damaged ({error}) and is built again.")
        return None
    if not intact:
        print(f"The cache {path} does not match its checksum and is built again.")
        return None
    return arrays


def write(path: Path, arrays: Arrays) -> None:
    """Writes the arrays to an `.npz` file atomically; see `write_atomically`.

    Args:
      path: the file; missing folders are created.
      arrays: the arrays, with their content hash as text in `sha256`.

    Raises:
      DataError: if the file cannot be written, for example on a full disk. No part of the file remains.
    """
    size = sum(array.nbytes for array in arrays.values())
    try:
        with write_atomically(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise DataError(
            f"The cache {path} cannot be written ({error}). The cache needs {size / 1e6:,.0f} MB: free disk space, or "
            "give another --cache-dir."
        ) from error
