"""The published class lists of few-shot image classification, and the comparison of a data set with a list."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from maml_jax import validation
from maml_jax.tasks.cache import DataError

Counts = Mapping[str, Mapping[str, int]]
"""`{split: {class: number of images}}`, for the splits 'train', 'val' and 'test'."""

LISTS: dict[str, dict] = json.loads(Path(__file__).with_name("published.json").read_text())
"""`{name: list}`. A list is a dict with `title`, `images` (per class), `sha256`, and the classes of `train`, `val` and
`test`."""


def sha256(counts: Counts) -> str:
    """Returns the content hash of the classes and their sizes, which does not depend on the order of the classes."""
    rows = [f"{split}/{name} {number}" for split, classes in counts.items() for name, number in classes.items()]
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()


def counts_of(name: str) -> dict[str, dict[str, int]]:
    """Returns the classes and sizes of the list `name`, a key of `LISTS`.

    Example:
      >>> {split: len(classes) for split, classes in counts_of("miniimagenet").items()}
      {'train': 64, 'val': 16, 'test': 20}
    """
    return {split: dict.fromkeys(LISTS[name][split], LISTS[name]["images"]) for split in ("train", "val", "test")}


def identify(counts: Counts) -> str | None:
    """Returns the name of the published list that equals `counts`, or None."""
    digest = sha256(counts)
    return next((name for name in LISTS if LISTS[name]["sha256"] == digest), None)


def check(name: str, counts: Counts, where: str, *, shown: int = 5) -> None:
    """Checks that `counts` equal the published list `name`.

    If numbers name all classes of a split, as in pickles with labels, the function compares only the number of classes
    and their sizes. The published names of such classes are unknown.

    Args:
      name: a key of `LISTS`.
      counts: the classes and sizes of a data set.
      where: the name of the data set in the message.
      shown: the largest number of differences that the message lists.

    Raises:
      ValueError: if there is no list with this name.
      DataError: if `counts` differ from the list; the message lists the expected and the found numbers of images.
    """
    validation.one_of("expect", name, tuple(LISTS))
    differences = []
    for split, expected in counts_of(name).items():
        found = counts.get(split, {})
        if found and all(label.isdecimal() for label in found):
            if len(found) != len(expected):
                differences.append(f"split {split}: expected {len(expected)} classes, found {len(found)}")
            expected = dict.fromkeys(found, LISTS[name]["images"])
        for label in sorted({*expected, *found}):
            if expected.get(label, 0) != found.get(label, 0):
                differences.append(
                    f"class {label} of split {split}: expected {expected.get(label, 0)} images, found "
                    f"{found.get(label, 0)}"
                )
    if differences:
        more = f"; and {len(differences) - shown} more differences" if len(differences) > shown else ""
        raise DataError(f"{where} is not {LISTS[name]['title']}: {'; '.join(differences[:shown])}{more}.")
