"""Reads the lists that divide images into training, validation and test, in CSV, JSON and text files.

CSV: `train.csv` with the columns filename,label (Ravi and Larochelle 2017). JSON: `base.json` with `image_names`,
`image_labels` and `label_names` (Chen et al. 2019). Text: `train.txt` with the name of a class on each line (Bertinetto
et al. 2019). The lists lie beside the images, in `splits/`, or in a folder of `splits/`.

References:
  Ravi and Larochelle (2017), Optimization as a Model for Few-Shot Learning, ICLR.
  Chen et al. (2019), A Closer Look at Few-shot Classification, arXiv:1904.04232.
  Bertinetto et al. (2019), Meta-learning with differentiable closed-form solvers, arXiv:1805.08136.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from maml_jax.tasks.cache import DataError
from maml_jax.tasks.tree import IMAGES, Tree, readable, shorten

SPLITS = ("train", "val", "test")
NAMES = {"train": ("train", "base"), "val": ("val", "valid", "validation"), "test": ("test", "novel")}
"""The names of the files and folders of each split."""

Files = dict[str, dict[str, list[str]]]
"""`{split: {class: paths of images}}`."""

HOW = (
    "Give a --data-dir, a folder or a .zip archive, with one of these contents. (1) The images, and train.csv, val.csv "
    "and test.csv with the columns filename,label. (2) The folders train/, val/ and test/, each with a folder for each "
    "class. (3) A folder for each class. (4) The pickles *train.pkl, *val.pkl and *test.pkl. (5) A folder for each "
    "class in data/, and the lists train.txt, val.txt and test.txt of classes in splits/. (6) The images, and the "
    "lists base.json, val.json and novel.json."
)


def find(tree: Tree, paths: Mapping[str, Any] | tuple[str, ...], folder: str, ending: str = "") -> dict[str, str]:
    """Finds the file or folder of each split.

    Args:
      tree: the folder or archive.
      paths: `tree.sizes` for files, `tree.folders` for folders.
      folder: the path of the folder to search, empty or with a slash at its end.
      ending: the ending of the files.

    Returns:
      `{split: path}`, without the splits that are not found.

    Raises:
      DataError: if a split has two files or folders, such as val.csv and valid.csv.
    """
    found = {}
    for split, names in NAMES.items():
        here = [path for name in names if (path := f"{folder}{name}{ending}") in paths]
        if len(here) > 1:
            raise DataError(f"{tree.where} has {' and '.join(here)} for one split. Keep one of them.")
        if here:
            found[split] = here[0]
    return found


def check_all_splits(tree: Tree, found: Mapping[str, str], kind: str) -> None:
    """Raises DataError if a split is missing."""
    missing = [split for split in SPLITS if split not in found]
    if missing:
        raise DataError(
            f"{tree.where} has a {kind} {next(iter(found.values()))}, but none for {' and '.join(missing)}. {HOW}"
        )


def read(tree: Tree, root: str, kind: str) -> Files:
    """Reads the lists of one kind.

    Args:
      tree: the folder or archive.
      root: the path of the folder of the data set, empty or with a slash at its end.
      kind: 'csv', 'json' or 'txt'.

    Returns:
      The images of each class, or an empty dict if there are no lists.

    Raises:
      DataError: if lists are malformed or missing, if a listed file is missing, or if a file is listed twice.
    """
    folders = [root, f"{root}splits/"]
    folders += [f"{name}/" for name in tree.folders if str(PurePosixPath(name).parent) == f"{root}splits"]
    lists = [found for folder in folders if (found := find(tree, tree.sizes, folder, f".{kind}"))]
    if not lists:
        return {}
    if len(lists) > 1:
        names = [next(iter(found.values())) for found in lists]
        raise DataError(f"{tree.where} has {len(lists)} divisions: {shorten(names)}. Keep the lists of one.")
    check_all_splits(tree, lists[0], {"csv": "CSV", "json": "JSON list", "txt": "text list"}[kind])
    reader = {"csv": _from_csvs, "json": _from_jsons, "txt": _from_texts}[kind]
    return reader(tree, root, {split: lists[0][split] for split in SPLITS})


def _from_csvs(tree: Tree, root: str, lists: dict[str, str]) -> Files:
    def place(filename: str, label: str) -> str | None:
        names = (readable(filename), _with_slashes(filename))
        places = (f"{folder}{name}" for name in names for folder in ("images/", "", f"images/{label}/", f"{label}/"))
        return next((root + place for place in places if root + place in tree.sizes), None)

    rows = {split: _csv_rows(tree, name) for split, name in lists.items()}
    return _collect(
        tree, rows, place, "A file is expected at images/FILENAME, FILENAME, images/LABEL/FILENAME or LABEL/FILENAME."
    )


def _from_jsons(tree: Tree, root: str, lists: dict[str, str]) -> Files:
    # The lists give the paths of the machine on which they were made: compare the class folder and the file name.
    endings: dict[str, list[str]] = {}
    for path in tree.images():
        if path.startswith(root):
            endings.setdefault("/".join(PurePosixPath(path).parts[-2:]), []).append(path)

    def place(filename: str, label: str) -> str | None:
        found = endings.get("/".join(PurePosixPath(_with_slashes(filename)).parts[-2:]), [])
        if len(found) > 1:
            raise DataError(f"{filename} in the lists of {tree.where} may be {shorten(found)}. Keep one of them.")
        return found[0] if found else None

    rows = {split: _json_rows(tree, name) for split, name in lists.items()}
    return _collect(tree, rows, place, "A file is expected in a folder with the name that the list gives.")


def _from_texts(tree: Tree, root: str, lists: dict[str, str]) -> Files:
    places = [f"{root}{place}" for place in ("data/", "images/", "")]
    images: dict[str, list[str]] = {}
    for path in tree.images():
        for place in places:
            if path.startswith(place):
                images.setdefault(place + path[len(place) :].split("/")[0], []).append(path)
    contents: Files = {}
    for split, name in lists.items():
        labels = [readable(line.strip()) for line in _text(tree, name, "text").splitlines() if line.strip()]
        contents[split] = {}
        for label in labels:
            folder = next((place + label for place in places if place + label in tree.folders), None)
            if folder is None or label in contents[split]:
                raise DataError(
                    f"{name} in {tree.where} must list a class folder on each line, each folder once, but lists "
                    f"{label!r}. A folder is expected at data/CLASS, images/CLASS or CLASS. {HOW}"
                )
            contents[split][label] = images.get(folder, [])
    return contents


Row = tuple[str, str, str]
"""The place of a row in its list, the file name and the class."""


def _collect(
    tree: Tree, rows: Mapping[str, Iterator[Row]], place: Callable[[str, str], str | None], expected: str
) -> Files:
    """Returns the images of each class, with the path that `place(filename, label)` finds for each row."""
    files: Files = {}
    missing: list[str] = []
    seen: dict[str, str] = {}
    total = 0
    for split, listed in rows.items():
        files[split] = {}
        for line, filename, label in listed:
            total += 1
            path = place(filename, label)
            if path is None:
                missing.append(readable(filename))
            elif path in seen:
                first = f"{line[0].upper()}{line[1:]} in {tree.where}"
                raise DataError(f"{first} lists {filename}, which {seen[path]} also lists.")
            else:
                seen[path] = line
                files[split].setdefault(label, []).append(path)
    if missing:
        raise DataError(
            f"The lists in {tree.where} list {total:,} files, of which {len(missing):,} are missing: "
            f"{shorten(missing)}. {expected} The types that are read are {' '.join(IMAGES)}."
        )
    return {split: {label: sorted(paths) for label, paths in classes.items()} for split, classes in files.items()}


def _csv_rows(tree: Tree, name: str) -> Iterator[Row]:
    where = f"{name} in {tree.where}"
    try:
        reader = csv.reader(io.StringIO(_text(tree, name, "CSV"), newline=""), strict=True)
        header = [column.strip() for column in next(reader, [])]
        if sorted(header) != ["filename", "label"]:
            raise DataError(f"{where} must have the columns filename,label, but has {','.join(header) or 'none'}.")
        for row in reader:
            if not row:
                continue
            row = [value.strip() for value in row]  # ' dog' and 'dog' are one class.
            if len(row) != 2 or not all(row):
                raise DataError(f"Line {reader.line_num} of {where} must be filename,label, but is {','.join(row)!r}.")
            values = dict(zip(header, row))
            yield f"line {reader.line_num} of {name}", values["filename"], readable(values["label"])
    except csv.Error as error:
        raise DataError(f"{where} is not a CSV: {error}.") from error


def _json_rows(tree: Tree, name: str) -> Iterator[Row]:
    where = f"{name} in {tree.where}"
    try:
        content = json.loads(_text(tree, name, "JSON"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}.") from error
    keys = {"image_names": str, "image_labels": int, "label_names": str}
    found: list[Any] = [content.get(key) if isinstance(content, dict) else None for key in keys]
    names, labels, label_names = found
    if not all(map(_is_list, found, keys.values())) or len(names) != len(labels):
        raise DataError(
            f"{where} must hold 'image_names' and 'image_labels', lists of equal length of texts and integers, and "
            f"'label_names', a list of texts. {HOW}"
        )
    for number, (filename, label) in enumerate(zip(names, labels)):
        if not 0 <= label < len(label_names):
            raise DataError(f"Image {number} of {where} has the label {label}, but there are {len(label_names)} names.")
        yield f"image {number} of {name}", filename, readable(label_names[label])


def _is_list(values: Any, kind: type) -> bool:
    """Whether `values` is a list whose entries have the type `kind`."""
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _text(tree: Tree, name: str, kind: str) -> str:
    try:
        return tree.read(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} in {tree.where} is not a {kind} in UTF-8: {error}.") from error


def _with_slashes(filename: str) -> str:
    """Returns a path as the listing has it: with slashes, and without `./` and repeated slashes."""
    return str(PurePosixPath(readable(filename).replace("\\", "/")))
