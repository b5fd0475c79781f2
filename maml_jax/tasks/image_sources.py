"""Finds the images, classes and splits of image data sets in folders, zip archives and pickles."""

import os
import re
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from maml_jax.tasks import class_lists, pickles, published
from maml_jax.tasks.cache import DataError
from maml_jax.tasks.class_lists import HOW, NAMES, SPLITS, Files
from maml_jax.tasks.tree import IMAGES, LARGEST_PICKLE, PICKLES, Tree, readable, shorten

Division = Literal["random", "none"]
"""How class folders without splits are divided. 'random': the sorted classes are shuffled with a fixed seed; 64% are
for training, 16% for validation and 20% for testing, as in MiniImagenet. 'none': all classes are in `train`."""

Contents = dict[str, dict[str, list[str]]] | dict[str, dict[str, list[np.ndarray]]]
"""`{split: {class: images}}`. An image is its path in the tree, or its pixels `[H, W, 3]`. Classes and paths are
sorted."""

UNLABELLED = ("unlabelled", "unlabeled")
"""Folders of images without a class."""


def listing(tree: Tree, division: Division, expect: str | None = None) -> Contents:
    """Detects the form of the data set and lists its images by split and class. Pickles are read completely.

    Args:
      tree: the folder or archive.
      division: how class folders without splits are divided. Classes with the names of one published list are divided
        as published, not at random.
      expect: the published list that is expected, for class folders whose names are those of several lists.

    Raises:
      DataError: if the data set has none of the forms, if a split is missing or empty, if a class is in two splits, if
        a list is malformed or lists missing files, or if class folders come with a published division that is not read.
    """
    csvs, jsons, texts = (partial(class_lists.read, kind=kind) for kind in ("csv", "json", "txt"))
    for root in _roots(tree):
        for form in (csvs, _from_pickles, _from_split_folders, jsons, texts):
            contents = form(tree, root)
            if contents:
                return _checked(tree, contents)
    # Class folders without splits.
    classes = _from_class_folders(tree, _roots(tree)[-1])
    if not any(classes.values()):
        others = f", only {shorten(sorted(tree.left_out))}" if tree.left_out else ""
        raise DataError(f"{tree.where} holds no data set of images{others}. {HOW}")
    if division == "none":
        return {"train": classes, "val": {}, "test": {}}
    return _checked(tree, _divide(tree, classes, expect))


def _roots(tree: Tree) -> list[str]:
    """Returns folders that may hold the data set: the top folder, its only subfolder (if it has one), and so on."""
    roots = [""]
    files = [name for name in tree.sizes if name.lower().endswith((*IMAGES, *PICKLES, ".csv")) or _divides(name)]
    while True:
        root = roots[-1]
        inside = [name[len(root) :] for name in tree.folders if name.startswith(root) and name not in (root, ".")]
        below = {name.split("/")[0] for name in inside}
        if len(below) != 1 or below & {*sum(NAMES.values(), ())} or any("/" not in name[len(root) :] for name in files):
            return roots
        roots.append(f"{root}{below.pop()}/")


def _from_pickles(tree: Tree, root: str) -> dict[str, dict[str, list[np.ndarray]]]:
    return {split: _from_pickle(tree, name) for split, name in _find_pickles(tree, root).items()}


def _from_split_folders(tree: Tree, root: str) -> Files:
    """Returns the class folders in the folders of the splits. Returns an empty dict if there are no such folders."""
    folders = class_lists.find(tree, tree.folders, root)
    nested = any(name.startswith(f"{folder}/") for name in tree.folders for folder in folders.values())
    # Class folders may be named train, val or test: they hold no folders, and other class folders are beside them.
    splits = {PurePosixPath(folder).name for folder in folders.values()}
    if not folders or (not nested and {*_from_class_folders(tree, root)} - splits):
        return {}
    class_lists.check_all_splits(tree, folders, "folder")
    return {split: _from_class_folders(tree, f"{folder}/") for split, folder in folders.items()}


def _from_class_folders(tree: Tree, root: str) -> dict[str, list[str]]:
    """Returns a class for each folder directly below `root`, with all images in the folder at any depth."""
    classes: dict[str, list[str]] = {}
    for folder in tree.folders:
        if folder.startswith(root) and folder != ".":
            classes.setdefault(folder[len(root) :].split("/")[0], [])
    for name in tree.images():
        folder, inside, _ = name[len(root) :].partition("/")
        if name.startswith(root) and inside:
            classes[folder].append(name)
    return {name: classes[name] for name in sorted(classes) if name.lower() not in UNLABELLED}


def _divide(tree: Tree, classes: dict[str, list[str]], expect: str | None) -> Files:
    """Divides the classes as published if a list has the same names. Otherwise divides them at random: 64% train, 16%
    val, 20% test."""
    _check_undivided(tree)
    lists = [
        name
        for name, known in published.LISTS.items()
        if {*known["train"], *known["val"], *known["test"]} == {*classes}
    ]
    if lists:
        name = expect if expect in lists else lists[0]
        if len(lists) > 1 and name != expect:
            raise DataError(
                f"{tree.where} has the classes of {' and '.join(lists)}, which divide them differently. Choose one "
                "with --expect (in Python: expect=)."
            )
        return {split: {label: classes[label] for label in published.LISTS[name][split]} for split in SPLITS}
    names = list(classes)
    train, val = round(0.64 * len(names)), round(0.16 * len(names))
    if not 0 < val < len(names) - train:
        raise DataError(f"{tree.where} has {len(names)} classes, too few to divide into train, val and test. {HOW}")
    # The seed is fixed. NumPy guarantees that the stream of RandomState never changes.
    order = [names[index] for index in np.random.RandomState(1).permutation(len(names))]
    parts = (order[:train], order[train : train + val], order[train + val :])
    return {split: {name: classes[name] for name in part} for split, part in zip(SPLITS, parts)}


def _check_undivided(tree: Tree) -> None:
    """Raises DataError if a file in the tree may hold a division of the classes that is not read."""
    files = sorted(name for name in (*tree.sizes, *tree.left_out) if _divides(name))
    if files:
        raise DataError(
            f"{tree.where} has {shorten(files)}, which may divide the classes into training, validation and test, but "
            "not in a form that is read. Classes with a published division are not divided at random. Remove a file "
            f"that is no division, or set the division to 'none' to train on all classes. {HOW}"
        )
    if tree.path.is_dir() and tree.path.resolve().name in ("data", "images"):
        parent = tree.path.resolve().parent
        beside = [name for name in map(readable, sorted(os.listdir(parent))) if name == "splits" or _divides(name)]
        if beside:
            raise DataError(
                f"{tree.where} holds classes without a division, but {shorten(beside)} beside this folder may divide "
                f"the classes. Give the folder {readable(str(parent))}, or move the images away from files that do not "
                "belong to them."
            )


_DIVISION = re.compile(rf"(^|[-_. ])({'|'.join(sum(NAMES.values(), ()))}|splits?)([-_. ]|$)")
_NO_DIVISION = (*IMAGES, ".py", ".ipynb", ".sh", ".md", ".log")


def _divides(name: str) -> bool:
    """Whether the name of a file is that of a division into training, validation and test classes."""
    path = PurePosixPath(name.lower())
    named = _DIVISION.search(path.name) is not None or "splits" in path.parts[:-1]
    return named and bool(path.suffix) and path.suffix not in _NO_DIVISION


def _checked(tree: Tree, contents: Any) -> Any:
    """Checks that every split has classes and that no class is in two splits. Sorts the classes."""
    for split, classes in contents.items():
        if not classes:
            raise DataError(f"Split {split} of {tree.where} has no classes.")
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        both = sorted({*contents[first]} & {*contents[second]})
        if both:
            raise DataError(
                f"In {tree.where}, {len(both)} classes are in both {first} and {second}: {shorten(both)}. Move "
                "each class into one split: classes for validation and test must be new to the model."
            )
    return {split: {name: contents[split][name] for name in sorted(contents[split])} for split in SPLITS}


def _find_pickles(tree: Tree, root: str) -> dict[str, str]:
    """Returns `{split: path of the pickle}`."""
    found = {}
    for split, names in NAMES.items():
        # Ignore `..._train_phase_val.pickle`: in some data sets this file holds more images of the training classes.
        ends = re.compile(rf"^(?!.*train_phase_(val|test))(.*[-_.])?({'|'.join(names)})$")
        files = [
            name
            for name in sorted(tree.sizes)
            if name.startswith(root)
            and "/" not in name[len(root) :]
            and name.lower().endswith(PICKLES)
            and ends.match(PurePosixPath(name).stem.lower())
        ]
        if len(files) > 1:
            raise DataError(f"{tree.where} has more than one pickle for {split}: {shorten(files)}. Keep one of them.")
        if files:
            found[split] = files[0]
    if found:
        class_lists.check_all_splits(tree, found, "pickle")
    return found


def _from_pickle(tree: Tree, name: str) -> dict[str, list[np.ndarray]]:
    tree.check_size(name, LARGEST_PICKLE)
    with tree.open(name) as file:
        images, classes = pickles.images(file, f"{name} in {tree.where}")
    return {label: [images[index] for index in indices] for label, indices in classes.items()}
