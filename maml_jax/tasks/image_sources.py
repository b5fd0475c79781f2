"""Finds the images, classes and splits of image data sets in folders, zip archives and pickles.

Nothing is unpacked to disk. All names are looked up in a listing of the folder or archive, so no name in an archive or
a CSV can refer to a file outside of the folder or archive.
"""

import contextlib
import csv
import hashlib
import io
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from maml_jax.tasks import pickles
from maml_jax.tasks.cache import DataError

SPLITS = ("train", "val", "test")
Division = Literal["random", "none"]
"""How class folders without splits are divided. 'random': the sorted classes are shuffled with a fixed seed; 64% are
for training, 16% for validation and 20% for testing, as in MiniImagenet. 'none': all classes are in `train`."""

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
PICKLES = (".pkl", ".pickle")
LARGEST_FILE = 64 << 20
"""Bytes of the largest image or CSV that is read."""
LARGEST_PICKLE = 4 << 30
"""Bytes of the largest pickle that is read; the pickle of MiniImagenet's training split has 0.8e9 bytes."""

HOW = (
    "Give a --data-dir, a folder or a .zip archive, with one of these contents. (1) The images, and train.csv, val.csv "
    "and test.csv with the columns filename,label. (2) The folders train/, val/ and test/, each with a folder for each "
    "class. (3) A folder for each class. (4) The pickles *train.pkl, *val.pkl and *test.pkl."
)


class Tree(NamedTuple):
    """The images, CSVs and pickles in a folder or an archive. Paths are relative to the folder or archive."""

    where: str
    """The folder or archive."""
    sizes: dict[str, int]
    """`{path: bytes}`."""
    stamps: dict[str, str]
    """`{path: stamp}`. A stamp changes with the file: the checksum in an archive, the modification time in a folder."""
    folders: tuple[str, ...]
    """Paths of all folders."""
    open: Callable[[str], IO[bytes]]
    """Opens the file with the given path."""

    def read(self, name: str) -> bytes:
        """Returns the content of a file. Raises DataError if the file is larger than `LARGEST_FILE`."""
        self.check_size(name, LARGEST_FILE)
        with self.open(name) as file:
            return file.read()

    def check_size(self, name: str, largest: int) -> None:
        """Raises DataError if the file has more than `largest` bytes."""
        if self.sizes[name] > largest:
            raise DataError(
                f"{name} in {self.where} has {self.sizes[name]:,} bytes, but at most {largest:,} are read. Remove the "
                "file if it is not part of the data set."
            )

    def sha256(self) -> str:
        """Returns a hash that changes when a file is added, removed or changed."""
        rows = [f"{name}\0{self.sizes[name]}\0{self.stamps[name]}" for name in sorted(self.sizes)]
        return hashlib.sha256("\n".join([*rows, *sorted(self.folders)]).encode("utf-8", "surrogateescape")).hexdigest()


Contents = dict[str, dict[str, list[str]]] | dict[str, dict[str, list[np.ndarray]]]
"""`{split: {class: images}}`. An image is its path in the tree, or its pixels `[H, W, 3]`. Classes and paths are
sorted."""
Files = dict[str, dict[str, list[str]]]
"""`{split: {class: paths of images}}`."""


@contextlib.contextmanager
def open_tree(data_dir: str | Path) -> Iterator[Tree]:
    """Lists a folder or a zip archive.

    A folder with one zip archive, and without images, CSVs and pickles, is read as the archive.

    Args:
      data_dir: the folder or archive.

    Yields:
      The listing. An archive stays open inside the `with` block.

    Raises:
      DataError: if `data_dir` does not exist, or if the archive is damaged. Damage that is found inside the `with`
        block also raises DataError.
    """
    path = Path(data_dir)
    if not path.exists():
        raise DataError(f"The data directory {path} does not exist. {HOW}")
    if path.is_dir():
        tree = _folder(path)
        archives = sorted(path.glob("*.zip"))
        if tree.sizes or len(archives) != 1:
            yield tree
            return
        (path,) = archives
    try:
        with zipfile.ZipFile(path) as archive:
            yield _archive(path, archive)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(
            f"The archive {path} cannot be read: it is damaged, truncated or encrypted ({error})."
        ) from error


def _folder(root: Path) -> Tree:
    sizes, stamps, folders = {}, {}, []
    for folder, below, names in os.walk(root, followlinks=True):
        # Follow links, except links to a parent folder, which would be followed without end.
        real = f"{os.path.realpath(folder)}/"
        below[:] = [name for name in below if not real.startswith(f"{os.path.realpath(os.path.join(folder, name))}/")]
        inside = PurePosixPath(Path(folder).relative_to(root).as_posix())
        if _is_hidden(f"{inside}/"):
            continue
        folders.append(str(inside))
        for name in names:
            if not _is_hidden(path := str(inside / name)) and path.lower().endswith((*IMAGES, *PICKLES, ".csv")):
                status = os.stat(root / path)
                sizes[path], stamps[path] = status.st_size, str(status.st_mtime_ns)
    return Tree(str(root), sizes, stamps, tuple(folders), lambda name: open(root / name, "rb"))


def _archive(path: Path, archive: zipfile.ZipFile) -> Tree:
    members = [member for member in archive.infolist() if not _is_hidden(member.filename)]
    files = [m for m in members if m.filename.lower().endswith((*IMAGES, *PICKLES, ".csv")) and not m.is_dir()]
    repeated = [name for name, count in Counter(member.filename for member in files).items() if count > 1]
    if repeated:
        raise DataError(f"The archive {path} holds {_shorten(repeated)} more than once.")
    parents = {str(parent) for member in members for parent in PurePosixPath(member.filename).parents}
    folders = {member.filename.rstrip("/") for member in members if member.is_dir()}
    return Tree(
        str(path),
        {member.filename: member.file_size for member in files},
        {member.filename: f"{member.CRC:08x}" for member in files},
        tuple(sorted(parents | folders)),
        lambda name: archive.open(name),
    )


def _is_hidden(path: str) -> bool:
    """Whether the path is a hidden file, or belongs to the metadata that macOS adds to archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(path).parts)


# Finding classes and splits


def listing(tree: Tree, division: Division) -> Contents:
    """Detects the form of the data set and lists its images by split and class. Pickles are read completely.

    Args:
      tree: the folder or archive.
      division: how class folders without splits are divided.

    Raises:
      DataError: if the data set has none of the forms, if a split is missing or empty, if a class is in two splits, or
        if a CSV is malformed or lists missing files.
    """
    for root in _roots(tree):
        # CSVs that list the images of each split.
        for lists in (root, f"{root}splits/"):
            csvs = {split: f"{lists}{split}.csv" for split in SPLITS if f"{lists}{split}.csv" in tree.sizes}
            if csvs:
                _check_all_splits(tree, csvs, "CSV")
                return _checked(tree, _from_csv(tree, root, lists))
        # Pickles, one for each split.
        pickled = _find_pickles(tree, root)
        if pickled:
            return _checked(tree, {split: _from_pickle(tree, name) for split, name in pickled.items()})
        # Folders of splits, with class folders in them.
        folders = {split: f"{root}{split}" for split in SPLITS if f"{root}{split}" in tree.folders}
        nested = any(name.startswith(f"{folder}/") for name in tree.folders for folder in folders.values())
        # Class folders may be named train, val or test: they hold no folders, and other class folders are beside them.
        if folders and (nested or not {*_from_class_folders(tree, root)} - {*SPLITS}):
            _check_all_splits(tree, folders, "folder")
            contents = {split: _from_class_folders(tree, f"{folder}/") for split, folder in folders.items()}
            return _checked(tree, contents)
    # Class folders without splits.
    classes = _from_class_folders(tree, _roots(tree)[-1])
    if not any(classes.values()):
        raise DataError(f"{tree.where} holds no data set of images. {HOW}")
    if division == "none":
        return {"train": classes, "val": {}, "test": {}}
    return _checked(tree, _divide(tree, classes))


def _roots(tree: Tree) -> list[str]:
    """Returns folders that may hold the data set: the top folder, its only subfolder (if it has one), and so on."""
    roots = [""]
    while True:
        root = roots[-1]
        inside = [name[len(root) :] for name in tree.folders if name.startswith(root) and name not in (root, ".")]
        below = {name.split("/")[0] for name in inside}
        if len(below) != 1 or below & {*SPLITS} or any("/" not in name[len(root) :] for name in tree.sizes):
            return roots
        roots.append(f"{root}{below.pop()}/")


def _check_all_splits(tree: Tree, found: Mapping[str, str], kind: str) -> None:
    missing = [split for split in SPLITS if split not in found]
    if missing:
        raise DataError(
            f"{tree.where} has a {kind} {next(iter(found.values()))}, but none for {' and '.join(missing)}. {HOW}"
        )


def _from_csv(tree: Tree, root: str, lists: str) -> Files:
    found: Files = {}
    missing: list[str] = []
    seen: dict[str, str] = {}
    total = 0
    for split in SPLITS:
        where = f"{lists}{split}.csv in {tree.where}"
        found[split] = {}
        for line, (filename, label) in _rows(tree, f"{lists}{split}.csv", where):
            total += 1
            places = (f"images/{filename}", filename, f"images/{label}/{filename}", f"{label}/{filename}")
            path = next((root + place for place in places if root + place in tree.sizes), None)
            if path is None:
                missing.append(filename)
            elif path in seen:
                raise DataError(f"Line {line} of {where} lists {filename}, which {seen[path]} also lists.")
            else:
                seen[path] = f"line {line} of {lists}{split}.csv"
                found[split].setdefault(label, []).append(path)
    if missing:
        raise DataError(
            f"The CSVs in {tree.where} list {total:,} files, of which {len(missing):,} are missing: "
            f"{_shorten(missing)}. A file is expected at images/FILENAME, FILENAME, images/LABEL/FILENAME or "
            "LABEL/FILENAME."
        )
    for classes in found.values():
        for paths in classes.values():
            paths.sort()
    return found


def _rows(tree: Tree, name: str, where: str) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yields the line number, file name and label of each row."""
    try:
        reader = csv.reader(io.StringIO(tree.read(name).decode("utf-8-sig"), newline=""), strict=True)
        header = [column.strip() for column in next(reader, [])]
        if sorted(header) != ["filename", "label"]:
            raise DataError(f"{where} must have the columns filename,label, but has {','.join(header) or 'none'}.")
        for row in reader:
            if not row:
                continue
            row = [value.strip() for value in row]  # ' dog' and 'dog' are one class.
            values = dict(zip(header, row))
            if len(row) != 2 or not all(row):
                raise DataError(f"Line {reader.line_num} of {where} must be filename,label, but is {','.join(row)!r}.")
            yield reader.line_num, (values["filename"], values["label"])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{where} is not a CSV in UTF-8: {error}.") from error


def _from_class_folders(tree: Tree, root: str) -> dict[str, list[str]]:
    """Returns a class for each folder directly below `root`, with all images in the folder at any depth."""
    classes: dict[str, list[str]] = {}
    for folder in tree.folders:
        if folder.startswith(root) and folder != ".":
            classes.setdefault(folder[len(root) :].split("/")[0], [])
    for name in tree.sizes:
        folder, inside, _ = name[len(root) :].partition("/")
        if name.startswith(root) and inside and name.lower().endswith(IMAGES):
            classes[folder].append(name)
    return {name: sorted(classes[name]) for name in sorted(classes)}


def _divide(tree: Tree, classes: dict[str, list[str]]) -> Files:
    """Divides the classes at random, with a fixed seed: 64% train, 16% val, 20% test."""
    names = list(classes)
    train, val = round(0.64 * len(names)), round(0.16 * len(names))
    if not 0 < val < len(names) - train:
        raise DataError(f"{tree.where} has {len(names)} classes, too few to divide into train, val and test. {HOW}")
    # NumPy guarantees that the stream of RandomState never changes.
    order = [names[index] for index in np.random.RandomState(1).permutation(len(names))]
    parts = (order[:train], order[train : train + val], order[train + val :])
    return {split: {name: classes[name] for name in part} for split, part in zip(SPLITS, parts)}


def _checked(tree: Tree, contents: Any) -> Any:
    """Checks that every split has classes and that no class is in two splits. Sorts the classes."""
    for split, classes in contents.items():
        if not classes:
            raise DataError(f"Split {split} of {tree.where} has no classes.")
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        both = sorted({*contents[first]} & {*contents[second]})
        if both:
            raise DataError(
                f"In {tree.where}, {len(both)} classes are in both {first} and {second}: {_shorten(both)}. Move "
                "each class into one split: classes for validation and test must be new to the model."
            )
    return {split: {name: contents[split][name] for name in sorted(contents[split])} for split in SPLITS}


def _find_pickles(tree: Tree, root: str) -> dict[str, str]:
    """Returns `{split: path of the pickle}`."""
    found = {}
    for split in SPLITS:
        # Ignore `..._train_phase_val.pickle`: in some data sets this file holds more images of the training classes.
        ends = re.compile(rf"^(?!.*train_phase_(val|test))(.*[-_.])?{split}$")
        files = [
            name
            for name in sorted(tree.sizes)
            if name.startswith(root)
            and "/" not in name[len(root) :]
            and name.lower().endswith(PICKLES)
            and ends.match(PurePosixPath(name).stem.lower())
        ]
        if len(files) > 1:
            raise DataError(f"{tree.where} has more than one pickle for {split}: {_shorten(files)}. Keep one of them.")
        if files:
            found[split] = files[0]
    if found:
        _check_all_splits(tree, found, "pickle")
    return found


def _from_pickle(tree: Tree, name: str) -> dict[str, list[np.ndarray]]:
    tree.check_size(name, LARGEST_PICKLE)
    with tree.open(name) as file:
        images, classes = pickles.images(file, f"{name} in {tree.where}")
    return {label: [images[index] for index in indices] for label, indices in classes.items()}


def _shorten(names: list[str], shown: int = 5) -> str:
    """Returns the first names and the number of the other names."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown:,} more" if len(names) > shown else "")
