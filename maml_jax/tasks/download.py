"""Download of the official Omniglot archives, the only code of the library that uses the network."""

import contextlib
import hashlib
import http.client
import sys
import urllib.request
from pathlib import Path
from typing import IO, NamedTuple

from maml_jax.atomic import write_atomically
from maml_jax.tasks.cache import DataError


class Archive(NamedTuple):
    """The address of an archive, with its size and hash for verification."""

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
    """Downloads the two official archives, 16 MB, into `folder`. Intact archives in `folder` are not downloaded again.

    Args:
      folder: the folder of the archives; missing folders are created.

    Raises:
      DataError: if an archive cannot be downloaded, or if its size or hash is wrong.
    """
    for archive in OMNIGLOT:
        fetch(archive, Path(folder) / archive.url.rsplit("/", 1)[1])


def fetch(archive: Archive, target: Path) -> None:
    """Downloads one archive. The file `target` appears only after the download is complete and verified.

    Args:
      archive: the address, size and hash.
      target: the file to write. An intact file is not downloaded again.

    Raises:
      DataError: if the download fails, or if the size or the hash is wrong. The message names the address.
    """
    if target.exists() and target.stat().st_size == archive.size and _sha256(target) == archive.sha256:
        print(f"{target} is already downloaded.")
        return
    print(f"Downloading {archive.url} ({archive.size / 1e6:.1f} MB)", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(write_atomically(target))
        except OSError as error:
            raise DataError(
                f"Cannot write {target}: {error}. Free disk space, change the permissions, or give another folder."
            ) from error
        try:
            size, digest = _copy(archive, file)
        except (OSError, http.client.HTTPException) as error:
            raise DataError(
                f"Cannot download {archive.url}: {error}. Check the connection, or download the archive by hand into "
                f"{target.parent}."
            ) from error
        if (size, digest) != (archive.size, archive.sha256):
            raise DataError(
                f"{archive.url} is not the official archive: expected {archive.size:,} bytes with sha256 "
                f"{archive.sha256}, but got {size:,} bytes with {digest}. Try again, or download the archive by hand."
            )


def _copy(archive: Archive, file: IO[bytes]) -> tuple[int, str]:
    """Copies the download to `file`, up to one byte beyond the expected size. Returns the size and the hash."""
    size, digest = 0, hashlib.sha256()
    with urllib.request.urlopen(archive.url, timeout=60) as response:
        while size <= archive.size and (block := response.read(min(archive.size + 1 - size, 1 << 20))):
            file.write(block)
            digest.update(block)
            size += len(block)
    file.flush()
    return size, digest.hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
