"""Omniglot (Lake et al. 2015): 1,623 handwritten characters, each drawn once by 20 people.

Any of its usual forms is read, through to one array of 28x28 images which is kept in a cache. The
drawings are 1-bit PNGs of 105x105 in which paper is 1 and ink is 0. TFDS does not say who drew an
image, so the 20 drawings of a character are put in the order of their pixels; with that, every form
gives the same array, bit for bit.
"""

import contextlib
import hashlib
import io
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, get_args

import numpy as np

from maml_jax import validation
from maml_jax.tasks import cache
from maml_jax.tasks.cache import DataError

CHARACTERS, DRAWINGS, SOURCE_SIZE, SIZE = 1623, 20, 105, 28
CONTENT_SHA256 = "c68135ce5f7c56d758e906dd0294a0833e06fb133ab0bb24f33936f21c9fdfd3"
"""Of all names and drawings at full size, in the order of `Omniglot`: equal for every way to read them."""

PARTS = ("images_background", "images_evaluation")
SplitName = Literal["paper", "vinyals"]
Resampling = Literal["lanczos", "box", "nearest"]
"""'lanczos' smooths first, so that strokes survive. The authors' script asked Pillow for the same, but
Pillow takes the nearest pixel for 1-bit images whatever it is told: 'nearest' is what they got."""


class Omniglot(NamedTuple):
    """All of Omniglot at 28x28."""

    images: np.ndarray
    """uint8 `[1623, 20, 28, 28]`: paper is 255, ink is 0."""
    names: tuple[str, ...]
    """`<part>/<alphabet>/<character>` of each class, sorted."""


class Splits(NamedTuple):
    """Class indices of the three splits, disjoint; a split is a value that `episodes` draws from."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


HOW = (
    "Give a --data-dir that holds images_background.zip and images_evaluation.zip, the folders unpacked from them, or "
    "omniglot/3.0.0 as TensorFlow Datasets prepares it; or fetch the official archives with `python -m "
    "experiments.omniglot --data-dir data/omniglot --download`."
)


def load(data_dir: str | Path, cache_dir: str | Path | None = None, *, resampling: Resampling = "lanczos") -> Omniglot:
    """Reads Omniglot at 28x28, from the cache or else from `data_dir`, which takes some 15 s once.

    Only what had the right content hash becomes a cache, so one that is whole is right whatever has become
    of `data_dir` since: that has to hold a data set, but is not read again.

    Args:
      data_dir: a prepared TFDS directory (`omniglot/3.0.0`), the two official archives, one archive
        with the members of both, or the folders `images_background` and `images_evaluation`; or a
        folder that holds one of these.
      cache_dir: where the 25 MB of the result are kept; None takes `cache.default_folder()`.
      resampling: the filter from 105x105 to 28x28.

    Raises:
      DataError: if the data is missing, damaged, incomplete or not Omniglot.
      ValueError: for an unknown `resampling`.
    """
    validation.one_of("resampling", resampling, get_args(Resampling))
    source = find_source(data_dir)
    path = Path(cache_dir or cache.default_folder()) / f"omniglot-{SIZE}-{resampling}.npz"
    cached = cache.read(path, _digest_of_arrays)
    if cached is not None:
        return Omniglot(cached["images"], tuple(cached["names"].tolist()))
    data = _resized(read_drawings(source), resampling)
    cache.write(path, {"images": data.images, "names": np.array(data.names), "sha256": np.array(digest(data))})
    return data


def split(name: SplitName, names: Iterable[str]) -> Splits:
    """Divides the characters.

    'paper': shuffled once, 1,100 / 100 / 423, as the authors' code does. Their shuffle followed the
    order of a directory listing and cannot be repeated exactly; this one is fixed.
    'vinyals': 1,028 / 172 / 423 by alphabet (Vinyals et al. 2016, in the lists of Torchmeta).
    """
    validation.one_of("split", name, get_args(SplitName))
    names = tuple(names)
    if name == "paper":
        # RandomState's stream is frozen by NumPy's compatibility policy.
        order = np.random.RandomState(1).permutation(len(names))
        return Splits(order[:1100], order[1100:1200], order[1200:])
    rules = json.loads(Path(__file__).with_name("omniglot_vinyals.json").read_text())
    alphabets = {alphabet: part for part in ("train", "val", "test") for alphabet in rules[part]}
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for index, path in enumerate(names):
        alphabet, character = path.split("/")[1:]
        parts[rules["characters"].get(f"{alphabet}/{character}") or alphabets[alphabet]].append(index)
    return Splits(*(np.array(parts[part]) for part in ("train", "val", "test")))


# Finding and reading the source


def find_source(data_dir: str | Path) -> Path | tuple[Path, ...]:
    """What in `data_dir` holds Omniglot: a TFDS or unpacked folder, or a tuple of archives.

    Raises:
      DataError: if there is nothing of the kind.
    """
    root = Path(data_dir)
    if not root.exists():
        raise DataError(f"The data directory {root} does not exist. {HOW}")
    if root.is_file():
        return (root,)
    for folder in (root, root / "omniglot", root / "3.0.0", root / "omniglot" / "3.0.0", root / "python"):
        if (folder / "dataset_info.json").exists() and (folder / "features.json").exists():
            return folder
        if all((folder / part).is_dir() for part in PARTS):
            return folder
        archives = tuple(folder / f"{part}.zip" for part in PARTS)
        if all(archive.exists() for archive in archives):
            return archives
        if (folder / "omniglot.zip").exists():
            return (folder / "omniglot.zip",)
    raise DataError(f"The data directory {root} holds no Omniglot. {HOW}")


Drawings = dict[str, np.ndarray]
"""From character name to its 20 drawings, bool `[20, 105, 105]`, True where there is paper."""


def read_drawings(source: Path | tuple[Path, ...]) -> Drawings:
    """Reads all drawings at full size in canonical order, and checks them against `CONTENT_SHA256`.

    Raises:
      DataError: naming the file that cannot be read, or what is missing or wrong.
    """
    if isinstance(source, tuple):
        found: Iterator[tuple[str, np.ndarray]] = _from_archives(source)
    elif (source / "features.json").exists():
        found = _from_tfds(source)
    else:
        found = _from_folder(source)
    characters: dict[str, list[np.ndarray]] = {}
    for name, drawing in found:
        characters.setdefault(name, []).append(drawing)
    where = _describe(source)
    _check_complete({name: len(drawings) for name, drawings in characters.items()}, where)
    ordered = {
        name: np.stack(sorted(characters[name], key=lambda drawing: np.packbits(drawing).tobytes()))
        for name in sorted(characters)
    }
    digest = hashlib.sha256()
    for name, stack in ordered.items():
        digest.update(name.encode() + b"\0" + np.packbits(stack).tobytes())
    if digest.hexdigest() != CONTENT_SHA256:
        raise DataError(
            f"The drawings in {where} are not those of Omniglot: their content hash is {digest.hexdigest()}, and "
            f"should be {CONTENT_SHA256}. {HOW}"
        )
    return ordered


def _describe(source: Path | tuple[Path, ...]) -> str:
    return str(source) if isinstance(source, Path) else " and ".join(map(str, source))


def _check_complete(counts: dict[str, int], where: str) -> None:
    if len(counts) != CHARACTERS:
        raise DataError(f"Omniglot has {CHARACTERS:,} characters, but {where} holds {len(counts):,}. {HOW}")
    for name, count in counts.items():
        if count != DRAWINGS:
            raise DataError(f"Every character has {DRAWINGS} drawings, but {name} in {where} has {count}. {HOW}")


def _from_archives(archives: tuple[Path, ...]) -> Iterator[tuple[str, np.ndarray]]:
    path = archives[0]
    try:
        with contextlib.ExitStack() as stack:
            members = []
            for path in archives:
                archive = stack.enter_context(zipfile.ZipFile(path))
                members += [(path, archive, name) for name in archive.namelist() if name.endswith(".png")]
            # What is missing is told before everything is read.
            _check_complete(Counter(_character(PurePosixPath(name)) for *_, name in members), _describe(archives))
            for path, archive, name in members:
                yield _character(PurePosixPath(name)), _decode(archive.read(name), f"{name} in {path}")
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise DataError(f"The archive {path} is damaged or cut short ({error}). {HOW}") from error


def _from_folder(root: Path) -> Iterator[tuple[str, np.ndarray]]:
    paths = [path for part in PARTS for path in sorted((root / part).glob("*/*/*.png"))]
    names = [_character(PurePosixPath(path.relative_to(root).as_posix())) for path in paths]
    _check_complete(Counter(names), str(root))
    for name, path in zip(names, paths):
        yield name, _decode(path.read_bytes(), str(path))


def _from_tfds(root: Path) -> Iterator[tuple[str, np.ndarray]]:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(root)
        name_of = builder.info.features["alphabet"].int2str
        for split_name, part in zip(("train", "test"), PARTS):
            for example in builder.as_data_source(split_name):
                # Ink and paper are {0, 1} with Pillow as decoder, {0, 255} with OpenCV.
                drawing = example["image"][..., 0] > 0
                character = f"{part}/{name_of(example['alphabet'])}/character{example['alphabet_char_id'] + 1:02d}"
                yield character, drawing
    except Exception as error:  # The readers below TFDS raise bare RuntimeErrors and more.
        raise DataError(f"TensorFlow Datasets cannot read {root}: {error}. {HOW}") from error


def _character(path: PurePosixPath) -> str:
    return "/".join(path.parts[-4:-1])


def _decode(png: bytes, where: str) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(png)) as image:
            drawing = np.asarray(image.convert("1"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"The image {where} is damaged ({error}). {HOW}") from error
    if drawing.shape != (SOURCE_SIZE, SOURCE_SIZE):
        raise DataError(f"The image {where} has shape {drawing.shape}, but Omniglot's are 105x105.")
    return drawing


def _resized(drawings: Drawings, resampling: Resampling) -> Omniglot:
    from PIL import Image

    filters = {
        "lanczos": Image.Resampling.LANCZOS,
        "box": Image.Resampling.BOX,
        "nearest": Image.Resampling.NEAREST,
    }
    images = np.empty((len(drawings), DRAWINGS, SIZE, SIZE), np.uint8)
    for row, character in zip(images, drawings.values()):
        for image, drawing in zip(row, character):
            # From 8 bits: Pillow would take the nearest pixel of a 1-bit image whatever the filter.
            grey = Image.fromarray(drawing.astype(np.uint8) * 255)
            image[:] = np.asarray(grey.resize((SIZE, SIZE), filters[resampling]))
    return Omniglot(images, tuple(drawings))


def digest(data: Omniglot) -> str:
    """SHA-256 of the names and the 28x28 images."""
    return hashlib.sha256("\n".join(data.names).encode() + data.images.tobytes()).hexdigest()


def _digest_of_arrays(arrays: cache.Arrays) -> str:
    return digest(Omniglot(arrays["images"], tuple(arrays["names"].tolist())))
