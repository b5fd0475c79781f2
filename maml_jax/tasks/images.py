"""Labelled images as a data set for few-shot classification.

`load` reads a folder or zip archive with class folders, the lists of a published data set (see `class_lists`), or the
common pickles of MiniImagenet, CIFAR-FS and FC100. Each split becomes one uint8 array, and the arrays are kept in a
cache. Classes and images are sorted by name, so all forms of the same images give equal arrays.
"""

import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from maml_jax import validation
from maml_jax.parallel import backend
from maml_jax.tasks import cache, image_files, image_sources, published, tree
from maml_jax.tasks.cache import DataError
from maml_jax.tasks.episodes import ImageClasses
from maml_jax.tasks.image_sources import SPLITS, Contents, Division
from maml_jax.tasks.tree import Tree

Resampling = Literal["lanczos", "bicubic", "bilinear", "box"]

LAYOUT = 3
"""The version of the cached arrays. Increase the version when the same source gives other arrays."""
COMPARED = 64
"""The number of cached images that are compared with the source when the cache is read."""


class ImageSplits(NamedTuple):
    """A data set in three splits. No class is in two splits. `val` and `test` are empty with `division='none'`."""

    train: ImageClasses
    """NumPy arrays, uint8 `[n, size, size, 3]`, RGB."""
    val: ImageClasses
    test: ImageClasses
    names: dict[str, tuple[str, ...]]
    """`{split: names of the classes}` in the order of the arrays, for the splits 'train', 'val' and 'test'."""
    source: str
    """The folder or archive that was read."""
    published: str | None
    """The published list with the same classes and class sizes: 'miniimagenet', 'cifar-fs', 'fc100', or None."""
    sha256: dict[str, str]
    """`{split: SHA-256}` of the names, sizes and pixels of the classes."""

    def describe(self) -> dict[str, Any]:
        """Returns source, published list, sizes and hashes, for reports and JSON."""
        splits = zip(SPLITS, (self.train, self.val, self.test))
        return {
            "source": self.source,
            "published": self.published and published.LISTS[self.published]["title"],
            **{
                split: {"classes": len(data.counts), "images": sum(data.counts), "sha256": self.sha256[split]}
                for split, data in splits
            },
        }


def load(
    data_dir: str | Path,
    cache_dir: str | Path | None = None,
    *,
    size: int = 84,
    resampling: Resampling = "lanczos",
    division: Division = "random",
    min_images: int = 1,
    expect: str | None = None,
) -> ImageSplits:
    """Reads a data set from `data_dir`, or from the cache if `data_dir` has been read before.

    The name of the cache file depends on the options and on the names, sizes and checksums of the source files (times
    of change in a folder). A changed source is therefore read again. A cache is also built again if one of 64 images,
    chosen at random, differs from the source. The function prints which files are left out on standard error.

    Args:
      data_dir: a folder or a zip archive; `image_sources.HOW` lists the forms.
      cache_dir: the folder of the cached arrays; None selects `cache.default_folder()`.
      size: height and width of the resized images in pixels. Images are not cropped; the aspect ratio may change.
      resampling: the filter for resizing, 'lanczos', 'bicubic', 'bilinear' or 'box'.
      division: how class folders without splits are divided into splits, 'random' or 'none'. Classes with the names of
        a published list are divided as published in place of 'random'.
      min_images: the number of images that every class must have, such as shots + queries.
      expect: the published list that the data must equal: 'miniimagenet', 'cifar-fs', 'fc100', or None for any data.

    Returns:
      The three splits, with the names of the classes and content hashes.

    Raises:
      DataError: if files are missing, damaged or listed twice, if a class is in two splits or has too few images, or if
        the data differ from `expect`. Errors in the listing are raised before an image is read.
      ValueError: for an option that is not allowed.

    Example:
      >>> import pathlib, tempfile
      >>> from PIL import Image
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> for name in ("robin", "wren"):
      ...     (folder / "birds" / name).mkdir(parents=True)
      ...     Image.new("RGB", (9, 7)).save(folder / "birds" / name / "0.png")
      >>> splits = load(folder / "birds", folder / "cache", size=8, division="none")
      >>> splits.train.images.shape, splits.names["train"]
      ((2, 8, 8, 3), ('robin', 'wren'))
    """
    validation.at_least("size", size, 1)
    validation.at_least("min_images", min_images, 1)
    validation.one_of("resampling", resampling, get_args(Resampling))
    validation.one_of("division", division, get_args(Division))
    validation.one_of("expect", expect, (None, *published.LISTS))

    with tree.open_tree(data_dir, image_sources.HOW) as files:
        tree.report(files.where, files.left_out)
        contents = image_sources.listing(files, division, expect)
        used = {entry for split in SPLITS for entry in _entries(contents, split) if isinstance(entry, str)}
        tree.report(files.where, {name: "in no class" for name in files.images() if name not in used})
        counts = {split: {name: len(images) for name, images in contents[split].items()} for split in SPLITS}
        if expect is not None:
            published.check(expect, counts, files.where)
        _check_sizes(counts, min_images, files.where)
        arrays, digests = _cached(files, contents, counts, Path(cache_dir or cache.default_folder()), size, resampling)
    train, val, test = (ImageClasses(arrays[split], tuple(counts[split].values())) for split in SPLITS)
    names = {split: tuple(counts[split]) for split in SPLITS}
    return ImageSplits(train, val, test, names, files.where, published.identify(counts), digests)


def _check_sizes(counts: published.Counts, min_images: int, where: str) -> None:
    for split, classes in counts.items():
        for name, found in classes.items():
            if found < min_images:
                raise DataError(
                    f"Class {name} of split {split} in {where} has too few images: expected at least {min_images}, "
                    f"found {found}."
                )


# The cache


def _cached(
    files: Tree, contents: Contents, counts: published.Counts, folder: Path, size: int, resampling: Resampling
) -> tuple[cache.Arrays, dict[str, str]]:
    """Returns the images `{split: uint8 [n, size, size, 3]}` from the cache or the source, and their hashes."""
    key = hashlib.sha256(json.dumps([LAYOUT, files.sha256(), size, resampling, counts]).encode()).hexdigest()
    path = folder / f"images-{size}-{resampling}-{key[:16]}.npz"

    def digest(arrays: cache.Arrays) -> str:
        return " ".join(_digests(arrays, counts).values())

    arrays = cache.read(path, digest)
    if arrays is not None and not _agrees(files, contents, arrays, size, resampling):
        print(f"The cache {path} differs from the images in {files.where} and is built again.")
        arrays = None
    if arrays is None:
        arrays = _read_all(files, contents, size, resampling)
        arrays["sha256"] = np.array(digest(arrays))
        cache.write(path, arrays)
    return arrays, dict(zip(SPLITS, str(arrays["sha256"]).split()))


def _digests(arrays: cache.Arrays, counts: published.Counts) -> dict[str, str]:
    hashes = {}
    for split in SPLITS:
        names, sizes, images = list(counts[split]), list(counts[split].values()), arrays[split]
        digest = hashlib.sha256(json.dumps([names, sizes, images.shape]).encode())
        digest.update(np.ascontiguousarray(images).data)
        hashes[split] = digest.hexdigest()
    return hashes


def _agrees(files: Tree, contents: Contents, arrays: cache.Arrays, size: int, resampling: Resampling) -> bool:
    """Whether cached images have the right shapes and type, and `COMPARED` of them, chosen at random, equal the source.

    The checksum of a cache protects against damage. This comparison finds a cache that was made from other images.
    """
    entries = {split: _entries(contents, split) for split in SPLITS}
    for split in SPLITS:
        if arrays[split].shape != (len(entries[split]), size, size, 3) or arrays[split].dtype != np.uint8:
            return False
    places = [(split, row) for split in SPLITS for row in range(len(entries[split]))]
    chosen = np.random.default_rng().permutation(len(places))[:COMPARED]
    return all(
        np.array_equal(arrays[split][row], _pixels(files, entries[split][row], size, resampling))
        for split, row in (places[index] for index in chosen)
    )


# Reading images


class Pictures(NamedTuple):
    """The images of a folder, without splits."""

    images: dict[str, np.ndarray]
    """`{path: RGB image}`, sorted by path; uint8 `[size, size, 3]`."""
    left_out: dict[str, str]
    """`{path: reason}` of all other files, including damaged images."""


def pictures(
    folder: str | Path, *, size: int = 84, resampling: Resampling | Literal["nearest"] = "lanczos"
) -> Pictures:
    """Reads all images in a folder or zip archive, without classes. Other files and damaged images are left out.

    The function prints the number, the names and the reasons of what is left out on standard error.

    Args:
      folder: a folder or a zip archive.
      size: height and width of the resized images in pixels.
      resampling: the filter for resizing, 'lanczos', 'bicubic', 'bilinear', 'box' or 'nearest'.

    Returns:
      The images, and what is left out.

    Raises:
      DataError: if the folder does not exist, or if an archive is damaged.
      ValueError: for an option that is not allowed.

    Example:
      >>> import pathlib, tempfile
      >>> from PIL import Image
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> Image.new("RGB", (9, 7)).save(folder / "wren.png")
      >>> {path: image.shape for path, image in pictures(folder, size=8).images.items()}
      {'wren.png': (8, 8, 3)}
    """
    validation.at_least("size", size, 1)
    validation.one_of("resampling", resampling, (*get_args(Resampling), "nearest"))
    with tree.open_tree(folder) as files:
        images, errors = {}, {}
        for name in files.images():
            try:
                images[name] = _pixels(files, name, size, resampling)
            except DataError as error:
                errors[name] = str(error)
        left_out = {**files.left_out, **dict.fromkeys(errors, "unreadable")}
        tree.report(files.where, left_out)
        for message in list(errors.values())[:5]:
            print(f"note: {message}", file=sys.stderr, flush=True)
        return Pictures(images, left_out)


def _read_all(files: Tree, contents: Contents, size: int, resampling: Resampling) -> dict[str, np.ndarray]:
    """Reads the images of each split into one array, `{split: uint8 [n, size, size, 3]}`."""
    entries = {split: _entries(contents, split) for split in SPLITS}
    arrays = {split: np.empty((len(entries[split]), size, size, 3), np.uint8) for split in SPLITS}

    def fill(row: np.ndarray, entry: str | np.ndarray) -> None:
        row[:] = _pixels(files, entry, size, resampling)

    # Pillow releases the interpreter lock, so threads use all cores.
    with ThreadPoolExecutor(backend.cores()) as threads:
        for split in SPLITS:
            for _ in threads.map(fill, arrays[split], entries[split]):
                pass
    return arrays


def _entries(contents: Contents, split: str) -> list[str | np.ndarray]:
    """Returns the images of a split in the order of the arrays."""
    return [image for images in contents[split].values() for image in images]


def _pixels(files: Tree, entry: str | np.ndarray, size: int, resampling: str) -> np.ndarray:
    """Returns an image as uint8 `[size, size, 3]`. `entry` is its path, or its pixels from a pickle."""
    if isinstance(entry, np.ndarray):
        return image_files.resize(entry, size, resampling)
    return image_files.resize(image_files.decode(files.read(entry), entry, files.where), size, resampling)
