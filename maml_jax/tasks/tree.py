"""Lists the files of a folder or a zip archive, and opens these files.

Nothing is unpacked to disk. All names are looked up in the listing, so no name in an archive or a CSV can refer to a
file outside of the folder or archive. Only regular files are listed. Each folder is listed once, so links between
folders end. Names are in Unicode's normal form C, which makes names from macOS, Windows and Linux comparable.
"""

import contextlib
import hashlib
import lzma
import os
import stat
import sys
import unicodedata
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from maml_jax.tasks.cache import DataError

IMAGES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff"),
    *(".webp", ".avif", ".tga"),
)
"""Endings of the images that are read, in lower case."""
PICKLES = (".pkl", ".pickle")
LISTS = (".csv", ".json", ".txt")
LARGEST_FILE = 64 << 20
"""Bytes of the largest image or list that is read."""
LARGEST_PICKLE = 4 << 30
"""Bytes of the largest pickle that is read; the pickle of MiniImagenet's training split has 0.8e9 bytes."""

_READ_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError),
    OSError,
)
"""Errors of `zipfile` and the operating system for a damaged, encrypted or unreadable file."""


class Tree(NamedTuple):
    """The images, lists and pickles in a folder or an archive. Paths are relative to the folder or archive."""

    path: Path
    """The folder or archive."""
    where: str
    """`path` for messages."""
    sizes: dict[str, int]
    """`{path: bytes}`."""
    stamps: dict[str, str]
    """`{path: stamp}`. A stamp changes with the content: the checksum in an archive, the times of the last changes of
    content and metadata in a folder."""
    folders: tuple[str, ...]
    """Paths of all folders."""
    left_out: dict[str, str]
    """`{path: reason}` of all other files and folders, except for the metadata of operating systems."""
    open: Callable[[str], IO[bytes]]
    """Opens the file with the given path. Raises DataError if the file cannot be opened."""

    def read(self, name: str) -> bytes:
        """Returns the content of a file.

        Raises:
          DataError: if the file is larger than `LARGEST_FILE`, damaged or unreadable.
        """
        self.check_size(name, LARGEST_FILE)
        with self.open(name) as file:
            try:
                content = file.read(self.sizes[name] + 1)
            except _READ_ERRORS as error:
                raise DataError(
                    f"The {'folder' if self.path.is_dir() else 'archive'} {self.where} cannot be read: {name} is "
                    f"damaged ({error})."
                ) from error
        if len(content) != self.sizes[name]:
            raise DataError(f"{name} in {self.where} changed while the data set was read: try again.")
        return content

    def check_size(self, name: str, largest: int) -> None:
        """Raises DataError if the file has more than `largest` bytes."""
        if self.sizes[name] > largest:
            raise DataError(
                f"{name} in {self.where} has {self.sizes[name]:,} bytes, but at most {largest:,} are read. Remove the "
                "file if it is not part of the data set."
            )

    def images(self) -> list[str]:
        """Returns the paths of all images, sorted."""
        return sorted(name for name in self.sizes if name.lower().endswith(IMAGES))

    def sha256(self) -> str:
        """Returns a hash that changes when a file is added, removed or changed."""
        rows = [f"{name}\0{self.sizes[name]}\0{self.stamps[name]}" for name in sorted(self.sizes)]
        return hashlib.sha256("\n".join([*rows, *sorted(self.folders)]).encode()).hexdigest()


@contextlib.contextmanager
def open_tree(data_dir: str | Path, how: str = "Give a folder or a zip archive.") -> Iterator[Tree]:
    """Lists a folder or a zip archive.

    A folder with one zip archive, and without images, lists and pickles, is read as the archive.

    Args:
      data_dir: the folder or archive.
      how: what to give in place of a `data_dir` that does not exist, for the error message.

    Yields:
      The listing. An archive stays open inside the `with` block.

    Raises:
      DataError: if `data_dir` does not exist or is no folder and no archive, or if the archive is damaged.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> for name in ("notes.odt", "wren.png"):
      ...     _ = (folder / name).write_bytes(b"12345")
      >>> with open_tree(folder) as tree:
      ...     print(tree.sizes, tree.left_out)
      {'wren.png': 5} {'notes.odt': 'not of a type that is read'}
    """
    path = Path(data_dir)
    if not path.exists():
        raise DataError(f"The data directory {readable(str(path))} does not exist. {how}")
    if path.is_dir():
        tree = _folder(path)
        archives = [file for file in sorted(path.glob("*.zip")) if file.is_file()]
        if tree.sizes or len(archives) != 1:
            yield tree
            return
        (path,) = archives
    where = readable(str(path))
    if not path.is_file():
        raise DataError(f"{where} must be a folder or a zip archive, but is neither a folder nor a regular file.")
    with contextlib.ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(path))
        except _READ_ERRORS as error:
            raise DataError(
                f"The archive {where} cannot be read: it is damaged or truncated, or no zip archive ({error}). Unpack "
                "an archive of another kind, and give the folder."
            ) from error
        yield _archive(path, archive)


def readable(name: str) -> str:
    """Returns a file name in Unicode's normal form C, with backslash escapes for bytes that are no UTF-8.

    Example:
      >>> print(readable("cafe\\u0301"), readable("caf\\udce9"))
      café caf\\udce9
    """
    return unicodedata.normalize("NFC", name).encode("utf-8", "backslashreplace").decode()


def report(where: str, left_out: Mapping[str, str]) -> None:
    """Prints how many files and folders are left out, the first names, and the reasons, on standard error.

    Args:
      where: the folder or archive.
      left_out: `{path: reason}`.
    """
    names: dict[str, list[str]] = {}
    for name in sorted(left_out):
        names.setdefault(left_out[name], []).append(name)
    parts = [f"{len(names[reason]):,} {reason} ({shorten(names[reason])})" for reason in sorted(names)]
    if parts:
        print(f"note: left out of {where}: {'; '.join(parts)}.", file=sys.stderr, flush=True)


def shorten(names: list[str], shown: int = 5) -> str:
    """Returns the first names and the number of the other names."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown:,} more" if len(names) > shown else "")


class _Listing:
    """Collects the files of a tree."""

    def __init__(self, where: str):
        self.where = where
        self.sizes: dict[str, int] = {}
        self.stamps: dict[str, str] = {}
        self.left_out: dict[str, str] = {}

    def add(self, name: str, size: int, stamp: str) -> bool:
        """Adds a file. Returns whether the file is of a type that is read."""
        if self._is_hidden(name):
            return False
        if not name.lower().endswith((*IMAGES, *PICKLES, *LISTS)):
            self.left_out[name] = "not of a type that is read"
            return False
        if name in self.sizes:
            raise DataError(
                f"{self.where} holds {name} more than once, perhaps in two Unicode forms of the name. Keep one file."
            )
        self.sizes[name], self.stamps[name] = size, stamp
        return True

    def _is_hidden(self, name: str) -> bool:
        """Whether a file is hidden. Hidden images are left out; other hidden files are metadata."""
        parts = PurePosixPath(name).parts
        if not any(part.startswith(".") or part == "__MACOSX" for part in parts):
            return False
        if name.lower().endswith(IMAGES) and "__MACOSX" not in parts and not parts[-1].startswith("._"):
            self.left_out[name] = "hidden"
        return True


def _folder(root: Path) -> Tree:
    listing, paths, folders = _Listing(readable(str(root))), {}, []
    # Links to a folder that is listed already, or that contains the root, are not followed.
    seen = {_identity(parent) for parent in Path(os.path.realpath(root)).parents}
    pending, links = deque([(root, "")]), deque[tuple[Path, str]]()
    while pending or links:
        folder, inside = pending.popleft() if pending else links.popleft()  # Follow links last.
        if _identity(folder) in seen:
            listing.left_out[inside] = "a link to a folder that is read already, or contains the data"
            continue
        seen.add(_identity(folder))
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except PermissionError:
            listing.left_out[inside] = "without permission to read"
            continue
        folders.append(inside or ".")
        for entry in entries:
            name = f"{inside}/{readable(entry.name)}".removeprefix("/")
            try:
                status = entry.stat()
            except OSError as error:
                listing.left_out[name] = f"unreadable ({error.strerror})"
                continue
            if stat.S_ISDIR(status.st_mode):
                if entry.name.startswith("."):
                    listing.left_out[name] = "hidden"
                elif entry.name != "__MACOSX":
                    (links if entry.is_symlink() else pending).append((Path(entry.path), name))
            elif not stat.S_ISREG(status.st_mode):
                listing.left_out[name] = "no regular file"
            elif listing.add(name, status.st_size, f"{status.st_mtime_ns} {status.st_ctime_ns}"):
                paths[name] = entry.path

    def open_file(name: str) -> IO[bytes]:
        try:
            return open(paths[name], "rb")
        except OSError as error:
            raise DataError(f"{name} in {listing.where} cannot be read: {error.strerror}.") from error

    return Tree(root, listing.where, listing.sizes, listing.stamps, tuple(folders), listing.left_out, open_file)


def _identity(folder: Path) -> tuple[int, int]:
    """Device and number of a folder, which are the same for every path to the folder."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _archive(path: Path, archive: zipfile.ZipFile) -> Tree:
    where = readable(str(path))
    listing, members, folders = _Listing(where), {}, {"."}
    for member in archive.infolist():
        name, is_folder = _member_name(member), member.filename.endswith(("/", "\\"))
        if not is_folder and listing.add(name, member.file_size, f"{member.CRC:08x}"):
            members[name] = member
        inside = PurePosixPath(name)
        for folder in (*inside.parents, *([inside] if is_folder else [])):
            if not any(part.startswith(".") or part == "__MACOSX" for part in folder.parts):
                folders.add(str(folder))

    def open_member(name: str) -> IO[bytes]:
        try:
            return archive.open(members[name])
        except _READ_ERRORS as error:
            raise DataError(f"The archive {where} cannot be read: {name} is damaged or encrypted ({error}).") from error

    return Tree(path, where, listing.sizes, listing.stamps, tuple(sorted(folders)), listing.left_out, open_member)


def _member_name(member: zipfile.ZipInfo) -> str:
    """Returns the name of a file in an archive, with slashes between folders."""
    name = member.filename
    if not member.flag_bits & 0x800:  # macOS writes UTF-8 without the flag for UTF-8.
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return readable(str(PurePosixPath(name.replace("\\", "/").lstrip("/"))))
