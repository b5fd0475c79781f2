"""Labelled images as a data set for few-shot classification.

`load` reads a folder or zip archive with the `train.csv`, `val.csv` and `test.csv` of Ravi and Larochelle (2017), class
folders, or the common pickles of MiniImagenet, CIFAR-FS and FC100 (see `image_sources`). Each split becomes one uint8
array, and the arrays are kept in a cache. Classes and images are sorted by name, so all forms of the same images give
equal arrays.
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
"""The version of the cached arrays. Increase the version when the same source gives other arrays."""


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

    The name of the cache file depends on the options and on the names, sizes and checksums of the source files
    (modification times in a folder). A changed source is therefore read again.

    Args:
      data_dir: a folder or a zip archive; see `image_sources`.
      cache_dir: the folder of the cached arrays; None selects `cache.default_folder()`.
      size: height and width of the resized images in pixels. Images are not cropped; the aspect ratio may change.
      resampling: the filter for resizing, 'lanczos', 'bicubic', 'bilinear' or 'box'.
      division: how class folders without splits are divided into splits, 'random' or 'none'.
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

    def check(counts: published.Counts) -> None:
        if expect is not None:
            published.check(expect, counts, where)
        _check_sizes(counts, min_images, where)

    with image_sources.open_tree(data_dir) as tree:
        where = tree.where
        key = hashlib.sha256(f"{LAYOUT} {tree.sha256()} {size} {resampling} {division}".encode()).hexdigest()
        path = Path(cache_dir or cache.default_folder()) / f"images-{size}-{resampling}-{key[:16]}.npz"
        arrays = cache.read(path, _digest)
        if arrays is None:
            contents = image_sources.listing(tree, division)
            check({split: {name: len(images) for name, images in contents[split].items()} for split in SPLITS})
            arrays = _read_all(tree, contents, size, resampling)
            cache.write(path, arrays)
    names = {split: tuple(arrays[f"{split}_names"].tolist()) for split in SPLITS}
    counts = {split: dict(zip(names[split], arrays[f"{split}_counts"].tolist())) for split in SPLITS}
    check(counts)  # The cache may have been written with other `min_images` and `expect`.
    train, val, test = (
        ImageClasses(arrays[f"{split}_images"], tuple(arrays[f"{split}_counts"].tolist())) for split in SPLITS
    )
    digests = dict(zip(SPLITS, str(arrays["sha256"]).split()))
    return ImageSplits(train, val, test, names, where, published.identify(counts), digests)


def _check_sizes(counts: published.Counts, min_images: int, where: str) -> None:
    for split, classes in counts.items():
        for name, found in classes.items():
            if found < min_images:
                raise DataError(
                    f"Class {name} of split {split} in {where} has too few images: expected at least {min_images}, "
                    f"found {found}."
                )


def _digest(arrays: cache.Arrays) -> str:
    """The hashes of the three splits, separated by spaces."""
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
    """Reads all images in a folder or zip archive, without classes.

    Args:
      folder: a folder or a zip archive.
      size: height and width of the resized images in pixels.
      resampling: the filter for resizing, 'lanczos', 'bicubic', 'bilinear', 'box' or 'nearest'.

    Returns:
      `{path: image}`, sorted by path. Images are RGB, uint8 `[size, size, 3]`.

    Raises:
      DataError: if the folder does not exist, or if an image is damaged or too large; the message names the file.

    Example:
      >>> import pathlib, tempfile
      >>> from PIL import Image
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> Image.new("RGB", (9, 7)).save(folder / "wren.png")
      >>> {path: image.shape for path, image in pictures(folder, size=8).items()}
      {'wren.png': (8, 8, 3)}
    """
    from PIL import Image

    resample = Image.Resampling[resampling.upper()]
    with image_sources.open_tree(folder) as tree, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        names = sorted(name for name in tree.sizes if name.lower().endswith(image_sources.IMAGES))
        return {name: _resize(_decode(tree, name), size, resample) for name in names}


def _read_all(tree: Tree, contents: Contents, size: int, resampling: Resampling) -> dict[str, np.ndarray]:
    """Reads all images into arrays: `<split>_images`, `<split>_names` and `<split>_counts`, and their `sha256`."""
    from PIL import Image

    arrays = {}
    for split in SPLITS:
        counts = [len(images) for images in contents[split].values()]
        arrays[f"{split}_images"] = np.empty((sum(counts), size, size, 3), np.uint8)
        arrays[f"{split}_names"] = np.array(list(contents[split]), np.str_)
        arrays[f"{split}_counts"] = np.array(counts, np.int32)
    rows = [row for split in SPLITS for row in arrays[f"{split}_images"]]
    entries = [entry for split in SPLITS for images in contents[split].values() for entry in images]
    resample = Image.Resampling[resampling.upper()]

    def fill(row: np.ndarray, entry: str | np.ndarray) -> None:
        row[:] = _resize(entry if isinstance(entry, np.ndarray) else _decode(tree, entry), size, resample)

    # Pillow releases the interpreter lock, so threads use all cores.
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as threads:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for _ in threads.map(fill, rows, entries):
            pass
    return {**arrays, "sha256": np.array(_digest(arrays))}


def _decode(tree: Tree, name: str) -> np.ndarray:
    """Reads an image file as uint8 `[H, W, 3]`.

    Raises:
      DataError: if the file is damaged or too large, or has pixels of 32 bits; the message names the file.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(tree.read(name))) as opened:
            upright = _rotate_upright(opened)
            if upright.mode.startswith("I;16"):  # 16 bits of grey: keep the upper 8 bits.
                return np.repeat((np.asarray(upright) >> 8).astype(np.uint8)[..., None], 3, axis=2)
            if upright.mode in ("I", "F"):
                raise DataError(
                    f"The image {name} in {tree.where} has pixels of 32 bits, for which the value of white is unknown. "
                    "Convert the image to 8 bits first."
                )
            # Pillow warns about palettes with transparency that are not converted to RGBA first.
            visible = upright.convert("RGBA") if "transparency" in upright.info else upright
            return np.asarray(visible.convert("RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"The image {name} in {tree.where} is refused: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise DataError(f"The image {name} in {tree.where} is damaged or cannot be read ({error}).") from error


def _rotate_upright(opened: Any) -> Any:
    """Applies the orientation in the EXIF data. Without a readable orientation the image is returned unchanged."""
    from PIL import Image

    try:
        orientation = opened.getexif().get(0x0112)
    except Exception:  # Damaged EXIF data are ignored: the pixels are intact.
        orientation = None
    turn = Image.Transpose
    turns = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
             6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}  # fmt: skip
    return opened.transpose(turns[orientation]) if orientation in turns else opened


def _resize(pixels: np.ndarray, size: int, resample: Any) -> np.ndarray:
    from PIL import Image

    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), resample))
