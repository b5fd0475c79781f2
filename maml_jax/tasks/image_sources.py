"""Where the images of a data set are and which class and split each belongs to: folders, zip archives, pickles.

Nothing is ever unpacked to disk, and all names are looked up in a listing made beforehand, so that no name
in an archive or a CSV leads out of it.
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
"""Of class folders without a split. 'random': the sorted classes are shuffled once and for all, and the first
64% train, the next 16% validate and the rest test, as MiniImagenet's 64/16/20. 'none': all are in `train`."""

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
PICKLES = (".pkl", ".pickle")
LARGEST_FILE = 64 << 20
"""Bytes of an image or a CSV."""
LARGEST_PICKLE = 4 << 30
"""Bytes; MiniImagenet's for training is 0.8e9."""

HOW = (
    "Give a --data-dir, a folder or a .zip archive, with train.csv, val.csv and test.csv (filename,label) and the "
    "images; or with train/, val/ and test/ of a folder for each class; or with a folder for each class; or with the "
    "pickles ...train.pkl, ...val.pkl and ...test.pkl."
)


class Tree(NamedTuple):
    """The files that matter in a folder or an archive, by their path within it."""

    where: str
    sizes: dict[str, int]
    """Bytes."""
    stamps: dict[str, str]
    """Changes when the file does: its checksum in an archive, its time of change in a folder."""
    folders: tuple[str, ...]
    open: Callable[[str], IO[bytes]]

    def read(self, name: str) -> bytes:
        """The content of a file that is not larger than `LARGEST_FILE`."""
        self.limit(name, LARGEST_FILE)
        with self.open(name) as file:
            return file.read()

    def limit(self, name: str, largest: int) -> None:
        """Raises DataError if the file is larger than that."""
        if self.sizes[name] > largest:
            raise DataError(
                f"{name} in {self.where} has {self.sizes[name]:,} bytes, but at most {largest:,} are read. Take it out "
                "if it does not belong there."
            )

    def sha256(self) -> str:
        """Changes whenever a file is added, taken away or changed."""
        rows = [f"{name}\0{self.sizes[name]}\0{self.stamps[name]}" for name in sorted(self.sizes)]
        return hashlib.sha256("\n".join([*rows, *sorted(self.folders)]).encode("utf-8", "surrogateescape")).hexdigest()


Contents = dict[str, dict[str, list[str]]] | dict[str, dict[str, list[np.ndarray]]]
"""From split to class to its images: paths in the tree, or pixels `[H, W, 3]`. Classes and paths are sorted."""
Files = dict[str, dict[str, list[str]]]


@contextlib.contextmanager
def open_tree(data_dir: str | Path) -> Iterator[Tree]:
    """Lists a folder or an archive; a folder in which there is but one archive stands for that.

    Raises:
      DataError: if it is missing, or an archive is damaged, also when that shows later, while it is open.
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
        raise DataError(f"The archive {path} cannot be read: damaged, cut short or encrypted ({error}).") from error


def _folder(root: Path) -> Tree:
    sizes, stamps, folders = {}, {}, []
    for folder, below, names in os.walk(root, followlinks=True):
        # Links are followed, but not back to where the walk came from.
        real = f"{os.path.realpath(folder)}/"
        below[:] = [name for name in below if not real.startswith(f"{os.path.realpath(os.path.join(folder, name))}/")]
        at = PurePosixPath(Path(folder).relative_to(root).as_posix())
        if not _matters(f"{at}/"):
            continue
        folders.append(str(at))
        for name in names:
            if _matters(path := str(at / name)) and path.lower().endswith((*IMAGES, *PICKLES, ".csv")):
                status = os.stat(root / path)
                sizes[path], stamps[path] = status.st_size, str(status.st_mtime_ns)
    return Tree(str(root), sizes, stamps, tuple(folders), lambda name: open(root / name, "rb"))


def _archive(path: Path, archive: zipfile.ZipFile) -> Tree:
    members = [member for member in archive.infolist() if _matters(member.filename)]
    files = [m for m in members if m.filename.lower().endswith((*IMAGES, *PICKLES, ".csv")) and not m.is_dir()]
    twice = [name for name, count in Counter(member.filename for member in files).items() if count > 1]
    if twice:
        raise DataError(f"The archive {path} holds {_some(twice)} more than once.")
    parents = {str(parent) for member in members for parent in PurePosixPath(member.filename).parents}
    own = {member.filename.rstrip("/") for member in members if member.is_dir()}
    return Tree(
        str(path),
        {member.filename: member.file_size for member in files},
        {member.filename: f"{member.CRC:08x}" for member in files},
        tuple(sorted(parents | own)),
        lambda name: archive.open(name),
    )


def _matters(path: str) -> bool:
    """Not what a system left behind: hidden files, and macOS's shadow of an archive."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(path).parts)


# Which class and split


def listing(tree: Tree, division: Division) -> Contents:
    """Finds out which form the data set has, and lists its images by split and class; pickles are read here.

    Raises:
      DataError: if it has none of the forms, or its lists are wrong.
    """
    for root in _roots(tree):
        for lists in (root, f"{root}splits/"):
            there = [split for split in SPLITS if f"{lists}{split}.csv" in tree.sizes]
            if there:
                _all_three(tree, {split: f"{lists}{split}.csv" for split in there}, "CSV")
                return _checked(tree, _from_csv(tree, root, lists))
        pickled = _pickles(tree, root)
        if pickled:
            return _checked(tree, {split: _from_pickle(tree, name) for split, name in pickled.items()})
        folders = {split: f"{root}{split}" for split in SPLITS if f"{root}{split}" in tree.folders}
        inside = any(name.startswith(f"{folder}/") for name in tree.folders for folder in folders.values())
        # Beside other classes, and without folders inside, they are classes that happen to be called so.
        if folders and (inside or not {*_from_class_folders(tree, root)} - {*SPLITS}):
            _all_three(tree, folders, "folder")
            found = {split: _from_class_folders(tree, f"{folder}/") for split, folder in folders.items()}
            return _checked(tree, found)
    classes = _from_class_folders(tree, _roots(tree)[-1])
    if not any(classes.values()):
        raise DataError(f"{tree.where} holds no images that could be a data set. {HOW}")
    return (
        _checked(tree, _divided(tree, classes)) if division == "random" else {"train": classes, "val": {}, "test": {}}
    )


def _roots(tree: Tree) -> list[str]:
    """Where a data set may begin: at the top, or in the only folder that is there, as in many archives."""
    roots = [""]
    while True:
        at = roots[-1]
        below = {
            name[len(at) :].split("/")[0] for name in tree.folders if name.startswith(at) and name not in (at, ".")
        }
        if len(below) != 1 or below & {*SPLITS} or any("/" not in name[len(at) :] for name in tree.sizes):
            return roots
        roots.append(f"{at}{below.pop()}/")


def _all_three(tree: Tree, there: Mapping[str, str], what: str) -> None:
    missing = [split for split in SPLITS if split not in there]
    if missing:
        raise DataError(
            f"{tree.where} has a {what} {next(iter(there.values()))}, but none for {' and '.join(missing)}. {HOW}"
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
                raise DataError(f"Line {line} of {where} lists {filename}, which {seen[path]} lists already.")
            else:
                seen[path] = f"line {line} of {lists}{split}.csv"
                found[split].setdefault(label, []).append(path)
    if missing:
        raise DataError(
            f"The CSVs in {tree.where} name {len(missing):,} files of {total:,} that are not there: {_some(missing)}. "
            "They are looked for in images/ and beside it, and there in a folder named by the label."
        )
    for classes in found.values():
        for paths in classes.values():
            paths.sort()
    return found


def _rows(tree: Tree, name: str, where: str) -> Iterator[tuple[int, tuple[str, str]]]:
    """Line number, file name and label of each row."""
    try:
        reader = csv.reader(io.StringIO(tree.read(name).decode("utf-8-sig"), newline=""), strict=True)
        header = [column.strip() for column in next(reader, [])]
        if sorted(header) != ["filename", "label"]:
            raise DataError(f"{where} must have the columns filename,label, but has {','.join(header) or 'none'}.")
        for row in reader:
            if not row:
                continue
            row = [value.strip() for value in row]  # As in the header: ' dog' in one split is 'dog' in another.
            values = dict(zip(header, row))
            if len(row) != 2 or not all(row):
                raise DataError(f"Line {reader.line_num} of {where} must be filename,label, but is {','.join(row)!r}.")
            yield reader.line_num, (values["filename"], values["label"])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{where} is no CSV in UTF-8: {error}.") from error


def _from_class_folders(tree: Tree, root: str) -> dict[str, list[str]]:
    """A class for each folder directly below `root`, with all images that lie in it at any depth."""
    classes: dict[str, list[str]] = {}
    for folder in tree.folders:
        if folder.startswith(root) and folder != ".":
            classes.setdefault(folder[len(root) :].split("/")[0], [])
    for name in tree.sizes:
        folder, inside, _ = name[len(root) :].partition("/")
        if name.startswith(root) and inside and name.lower().endswith(IMAGES):
            classes[folder].append(name)
    return {name: sorted(classes[name]) for name in sorted(classes)}


def _divided(tree: Tree, classes: dict[str, list[str]]) -> Files:
    names = list(classes)
    train, val = round(0.64 * len(names)), round(0.16 * len(names))
    if not 0 < val < len(names) - train:
        raise DataError(f"{tree.where} has {len(names)} classes, too few to be divided in 64, 16 and 20%. {HOW}")
    # RandomState's stream is frozen by NumPy's compatibility policy.
    order = [names[index] for index in np.random.RandomState(1).permutation(len(names))]
    parts = (order[:train], order[train : train + val], order[train + val :])
    return {split: {name: classes[name] for name in part} for split, part in zip(SPLITS, parts)}


def _checked(tree: Tree, found: Any) -> Any:
    """`found`, sorted, once it is sure that every split has classes and none is in two."""
    for split, classes in found.items():
        if not classes:
            raise DataError(f"Split {split} of {tree.where} has no classes.")
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        both = sorted({*found[first]} & {*found[second]})
        if both:
            raise DataError(
                f"In {tree.where}, {len(both)} classes are in both {first} and {second}: {_some(both)}. Nothing would "
                "be held out: each class must be in one split only."
            )
    return {split: {name: found[split][name] for name in sorted(found[split])} for split in SPLITS}


def _pickles(tree: Tree, root: str) -> dict[str, str]:
    """From split to its pickle."""
    found = {}
    for split in SPLITS:
        # Some sets come with `..._train_phase_val.pickle` too, other images of the training classes.
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
            raise DataError(f"{tree.where} has more than one pickle for {split}: {_some(files)}. Leave one there.")
        if files:
            found[split] = files[0]
    if found:
        _all_three(tree, found, "pickle")
    return found


def _from_pickle(tree: Tree, name: str) -> dict[str, list[np.ndarray]]:
    tree.limit(name, LARGEST_PICKLE)
    with tree.open(name) as file:
        images, classes = pickles.images(file, f"{name} in {tree.where}")
    return {label: [images[index] for index in indices] for label, indices in classes.items()}


def _some(names: list[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown:,} more" if len(names) > shown else "")
