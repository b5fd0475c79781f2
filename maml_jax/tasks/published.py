"""The published class lists of few-shot image classification, and how far a data set is from one of them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from maml_jax import validation
from maml_jax.tasks.cache import DataError

Counts = Mapping[str, Mapping[str, int]]
"""From split (train, val, test) to class name to its number of images."""

LISTS: dict[str, dict] = json.loads(Path(__file__).with_name("published.json").read_text())
"""By name: `title`, `images` (of each class), `sha256`, and the classes of `train`, `val` and `test`."""


def sha256(counts: Counts) -> str:
    """Content hash of the classes and their sizes, independent of the order in which they are given."""
    rows = [f"{split}/{name} {number}" for split, classes in counts.items() for name, number in classes.items()]
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()


def counts_of(name: str) -> dict[str, dict[str, int]]:
    """The classes and sizes of the list with this name, a key of `LISTS`."""
    return {split: dict.fromkeys(LISTS[name][split], LISTS[name]["images"]) for split in ("train", "val", "test")}


def recognise(counts: Counts) -> str | None:
    """The published list that these are exactly, or None."""
    found = sha256(counts)
    return next((name for name in LISTS if LISTS[name]["sha256"] == found), None)


def check(name: str, counts: Counts, where: str, *, shown: int = 5) -> None:
    """Tells how `counts` differ from the published list `name`.

    Classes that are all named by numbers, as in pickles that hold only labels, are compared by their sizes
    alone: which published class a number stands for is not known.

    Raises:
      ValueError: if there is no list with that name.
      DataError: if they differ, with the classes, the expected and the found numbers of images.
    """
    validation.one_of("expect", name, tuple(LISTS))
    wrong = []
    for split, expected in counts_of(name).items():
        found = counts.get(split, {})
        if found and all(label.isdecimal() for label in found):
            if len(found) != len(expected):
                wrong.append(f"split {split}: expected {len(expected)} classes, found {len(found)}")
            expected = dict.fromkeys(found, LISTS[name]["images"])
        for label in sorted({*expected, *found}):
            if expected.get(label, 0) != found.get(label, 0):
                wrong.append(
                    f"class {label} of split {split}: expected {expected.get(label, 0)} images, found "
                    f"{found.get(label, 0)}"
                )
    if wrong:
        more = f"; and {len(wrong) - shown} more differences" if len(wrong) > shown else ""
        raise DataError(f"{where} is not {LISTS[name]['title']}: {'; '.join(wrong[:shown])}{more}.")
