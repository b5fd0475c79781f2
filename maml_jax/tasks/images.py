"""Any labelled images as a data set for few-shot classification.

A folder or zip archive with the `train/val/test.csv` of Ravi and Larochelle (2017), class folders, or the pickles of
MiniImagenet, CIFAR-FS and FC100 in circulation (`image_sources` says which forms exactly) become one uint8 array for
each split, which is kept in a cache. Classes and their images are sorted by name, so that each form of the same
images gives the same arrays.
"""

import hashlib
import io
import json
import os
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from maml_jax import validation
from maml_jax.tasks import cache, image_sources, published
from maml_jax.tasks.cache import DataError
from maml_jax.tasks.episodes import ImageClasses
from maml_jax.tasks.image_sources import SPLITS, Contents, Division, Tree

Resampling = Literal["lanczos", "bicubic", "bilinear", "box"]

LAYOUT = 2
"""Of the cache; raise it when what is made of the same source changes."""


class ImageSplits(NamedTuple):
    """A data set. The three splits have no class in common; val and test are empty with `division='none'`."""

    train: ImageClasses
    """NumPy arrays `[n, size, size, 3]`, RGB."""
    val: ImageClasses
    test: ImageClasses
    names: dict[str, tuple[str, ...]]
    """From 'train', 'val' and 'test' to the names of the classes, in their order."""
    source: str
    """The folder or archive."""
    published: str | None
    """The published list that the classes and their sizes are exactly: 'miniimagenet', 'cifar-fs', 'fc100'; or None."""
    sha256: dict[str, str]
    """Content hash of each split: names, sizes and pixels."""

    def describe(self) -> dict[str, Any]:
        """What a report says of the data: sizes and hashes, as plain values."""
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
    least: int = 1,
    expect: str | None = None,
) -> ImageSplits:
    """Reads a data set, from the cache or else from `data_dir`.

    The cache belongs to the names, sizes and checksums (in a folder: times of change) of the source's files, so
    that a changed source is read anew.

    Args:
      data_dir: a folder or a zip archive.
      cache_dir: where the arrays are kept; None takes `cache.default_folder()`.
      size: height and width in pixels to which images are resized; each side by itself, nothing is cropped.
      resampling: the filter of that.
      division: of class folders without splits of their own.
      least: images that every class must have, such as shots + queries.
      expect: the published list that this must be: 'miniimagenet', 'cifar-fs' or 'fc100'.

    Raises:
      DataError: naming what is missing, damaged, listed twice, in two splits, too few or not as expected; what the
        listing can tell comes before any image is read.
      ValueError: for an option that is not allowed.
    """
    validation.at_least("size", size, 1)
    validation.at_least("least", least, 1)
    validation.one_of("resampling", resampling, get_args(Resampling))
    validation.one_of("division", division, get_args(Division))
    validation.one_of("expect", expect, (None, *published.LISTS))

    def check(counts: published.Counts) -> None:
        if expect is not None:
            published.check(expect, counts, where)
        _check_sizes(counts, least, where)

    with image_sources.open_tree(data_dir) as tree:
        where = tree.where
        key = hashlib.sha256(f"{LAYOUT} {tree.sha256()} {size} {resampling} {division}".encode()).hexdigest()
        path = Path(cache_dir or cache.default_folder()) / f"images-{size}-{resampling}-{key[:16]}.npz"
        arrays = cache.read(path, _digest)
        if arrays is None:
            found = image_sources.listing(tree, division)
            check({split: {name: len(images) for name, images in found[split].items()} for split in SPLITS})
            arrays = _resized(tree, found, size, resampling)
            cache.write(path, arrays)
    names = {split: tuple(arrays[f"{split}_names"].tolist()) for split in SPLITS}
    counts = {split: dict(zip(names[split], arrays[f"{split}_counts"].tolist())) for split in SPLITS}
    check(counts)  # What is cached may have been read with other demands.
    train, val, test = (
        ImageClasses(arrays[f"{split}_images"], tuple(arrays[f"{split}_counts"].tolist())) for split in SPLITS
    )
    digests = dict(zip(SPLITS, str(arrays["sha256"]).split()))
    return ImageSplits(train, val, test, names, where, published.recognise(counts), digests)


def _check_sizes(counts: published.Counts, least: int, where: str) -> None:
    for split, classes in counts.items():
        for name, found in classes.items():
            if found < least:
                raise DataError(
                    f"Class {name} of split {split} in {where} has too few images: expected at least {least}, found "
                    f"{found}."
                )


def _digest(arrays: cache.Arrays) -> str:
    """The hashes of the three splits, with spaces between."""
    hashes = []
    for split in SPLITS:
        images, names, counts = (arrays[f"{split}_{part}"] for part in ("images", "names", "counts"))
        digest = hashlib.sha256(json.dumps([names.tolist(), counts.tolist(), images.shape]).encode())
        digest.update(np.ascontiguousarray(images).data)
        hashes.append(digest.hexdigest())
    return " ".join(hashes)


# Reading images


def pictures(
    folder: str | Path, *, size: int = 84, resampling: Resampling | Literal["nearest"] = "lanczos"
) -> dict[str, np.ndarray]:
    """All images in a folder or zip archive, RGB uint8 `[size, size, 3]`, by their path in it, sorted.

    Raises:
      DataError: naming the folder that does not exist, or the image that is damaged or too large.
    """
    from PIL import Image

    resample = Image.Resampling[resampling.upper()]
    with image_sources.open_tree(folder) as tree, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        names = sorted(name for name in tree.sizes if name.lower().endswith(image_sources.IMAGES))
        return {name: _fitted(_decoded(tree, name), size, resample) for name in names}


def _resized(tree: Tree, found: Contents, size: int, resampling: Resampling) -> dict[str, np.ndarray]:
    """All images as arrays: for each split `<split>_images`, `_names` and `_counts`, and `sha256` of them."""
    from PIL import Image

    arrays = {}
    for split in SPLITS:
        counts = [len(images) for images in found[split].values()]
        arrays[f"{split}_images"] = np.empty((sum(counts), size, size, 3), np.uint8)
        arrays[f"{split}_names"] = np.array(list(found[split]), np.str_)
        arrays[f"{split}_counts"] = np.array(counts, np.int32)
    rows = [row for split in SPLITS for row in arrays[f"{split}_images"]]
    entries = [entry for split in SPLITS for images in found[split].values() for entry in images]
    resample = Image.Resampling[resampling.upper()]

    def fill(row: np.ndarray, entry: str | np.ndarray) -> None:
        row[:] = _fitted(entry if isinstance(entry, np.ndarray) else _decoded(tree, entry), size, resample)

    # Pillow lets go of the interpreter while it works, so threads share the cores.
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as threads:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for _ in threads.map(fill, rows, entries):
            pass
    return {**arrays, "sha256": np.array(_digest(arrays))}


def _decoded(tree: Tree, name: str) -> np.ndarray:
    """An image file as uint8 `[H, W, 3]`.

    Raises:
      DataError: naming the file, if it is damaged or too large, or of a kind that has no one meaning in 8 bits.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(tree.read(name))) as opened:
            upright = _upright(opened)
            if upright.mode.startswith("I;16"):
                return np.repeat((np.asarray(upright) >> 8).astype(np.uint8)[..., None], 3, axis=2)
            if upright.mode in ("I", "F"):
                raise DataError(
                    f"The image {name} in {tree.where} has pixels of 32 bits, whose white is not known. Convert it to "
                    "8 bits first."
                )
            # Pillow warns of palettes with transparency unless they go by RGBA.
            visible = upright.convert("RGBA") if "transparency" in upright.info else upright
            return np.asarray(visible.convert("RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"The image {name} in {tree.where} is refused: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise DataError(f"The image {name} in {tree.where} is damaged or cannot be read ({error}).") from error


def _upright(opened: Any) -> Any:
    """The picture as it was taken, by the camera's note of how it was held, where there is one that can be read."""
    from PIL import Image

    try:
        held = opened.getexif().get(0x0112)
    except Exception:  # Notes come in any state, and a picture is none the worse for it.
        held = None
    turn = Image.Transpose
    turns = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
             6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}  # fmt: skip
    return opened.transpose(turns[held]) if held in turns else opened


def _fitted(pixels: np.ndarray, size: int, resample: Any) -> np.ndarray:
    from PIL import Image

    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), resample))
