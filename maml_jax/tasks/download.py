"""Fetches the official Omniglot archives, and nothing else ever touches the network."""

import hashlib
import http.client
import os
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

from maml_jax.tasks.cache import DataError


class Archive(NamedTuple):
    """A file to fetch, and how to know that it is the right one."""

    url: str
    size: int
    """Bytes."""
    sha256: str


_BASE = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
OMNIGLOT = (
    Archive(
        _BASE + "images_background.zip",
        9_464_212,
        "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
    ),
    Archive(
        _BASE + "images_evaluation.zip",
        6_462_886,
        "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
    ),
)


def omniglot(folder: str | Path) -> None:
    """Fetches the two official archives into `folder`, skipping those that are there and whole.

    Raises:
      DataError: if an archive cannot be fetched, or is not what it should be.
    """
    for archive in OMNIGLOT:
        fetch(archive, Path(folder) / archive.url.rsplit("/", 1)[1])


def fetch(archive: Archive, target: Path) -> None:
    """Fetches one archive to `target`, which appears only once it is whole and checked.

    Raises:
      DataError: naming the address and what is wrong with it.
    """
    if target.exists() and target.stat().st_size == archive.size and _sha256(target) == archive.sha256:
        print(f"{target} is already there.")
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    except OSError as error:
        raise DataError(f"Cannot write {target}: {error}. Make room or give the rights, or another folder.") from error
    print(f"Fetching {archive.url} ({archive.size / 1e6:.1f} MB)", file=sys.stderr)
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(archive.url, timeout=60) as response:
            # One byte more than expected is enough to know that it is the wrong file.
            while (room := archive.size + 1 - file.tell()) > 0 and (block := response.read(min(room, 1 << 20))):
                file.write(block)
        size, digest = os.path.getsize(part), _sha256(Path(part))
        if (size, digest) != (archive.size, archive.sha256):
            raise DataError(
                f"{archive.url} is not the official archive: expected {archive.size:,} bytes with sha256 "
                f"{archive.sha256}, but got {size:,} bytes with {digest}. Try again, or fetch it by hand."
            )
        os.chmod(part, 0o644)  # Temporary files are private.
        os.replace(part, target)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"Cannot fetch {archive.url}: {error}. Check the connection, or fetch it by hand into {target.parent}."
        ) from error
    finally:
        Path(part).unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
