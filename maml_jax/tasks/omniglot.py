"""Omniglot (Lake et al. 2015): 1,623 handwritten characters, each drawn once by 20 people.

`load` reads any of the usual forms and returns one array of 28x28 images. The array is kept in a cache. The drawings
are 1-bit PNGs of 105x105 pixels, in which paper is 1 and ink is 0. TensorFlow Datasets (TFDS) does not store who drew
an image, so the 20 drawings of a character are sorted by their pixels. All forms therefore give bit-equal arrays.

References:
  Lake, Salakhutdinov and Tenenbaum (2015), Human-level concept learning through probabilistic program induction,
  Science 350 (6266).
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, get_args

import numpy as np

from maml_jax import validation
from maml_jax.tasks import cache
from maml_jax.tasks.cache import DataError
from maml_jax.tasks.image_files import open_image
from maml_jax.tasks.tree import open_tree

CHARACTERS, DRAWINGS, SOURCE_SIZE, SIZE = 1623, 20, 105, 28
CONTENT_SHA256 = "c68135ce5f7c56d758e906dd0294a0833e06fb133ab0bb24f33936f21c9fdfd3"
"""SHA-256 of all names and full-size drawings, in the order of `Omniglot`. The hash is the same for every form."""
IMAGES_SHA256 = {
    "lanczos": "41bd0b32f9d6fd35de60e28ec425d78a0f726e5bd579661a681cefc88e3761b7",
    "box": "0ab1ac7fba289b4612ff5d49f67f9b4b7f7077f9fbc8216ef35b3ae92cb88534",
    "nearest": "5406959191d9472771b5543ed0992115b4d25af5cf7e824f51f8ab7681634453",
}
"""For each filter, the SHA-256 of all names and resized images, as `digest` returns. A cache with other images is not
used."""

PARTS = ("images_background", "images_evaluation")
SplitName = Literal["paper", "vinyals"]
Resampling = Literal["lanczos", "box", "nearest"]
"""The filter for resizing. 'lanczos' smooths, so thin strokes remain visible. The script of Finn et al. gave Pillow
the filter 'lanczos', but Pillow ignores the filter for 1-bit images and takes the nearest pixel. 'nearest' therefore
gives the images of Finn et al."""


class Omniglot(NamedTuple):
    """All characters of Omniglot at 28x28 pixels."""

    images: np.ndarray
    """uint8 `[1623, 20, 28, 28]`; paper is 255, ink is 0."""
    names: tuple[str, ...]
    """`<part>/<alphabet>/<character>` of each class, sorted."""


class Splits(NamedTuple):
    """Indices of the classes of three disjoint splits, int `[classes]` each."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


HOW = (
    "Give a --data-dir that holds images_background.zip and images_evaluation.zip, the folders unpacked from these "
    "archives, or omniglot/3.0.0 from TensorFlow Datasets. To download the official archives, run `python -m "
    "experiments.omniglot --data-dir data/omniglot --download`."
)


def load(data_dir: str | Path, cache_dir: str | Path | None = None, *, resampling: Resampling = "lanczos") -> Omniglot:
    """Reads Omniglot at 28x28 pixels from `data_dir`, or from the cache. The first call takes about 15 s.

    Images are written to the cache after their content hash is verified. If the cache exists, `data_dir` must still
    hold a data set, but the data set is not read again.

    Args:
      data_dir: a TFDS directory (`omniglot/3.0.0`), a folder with the two official archives, an archive with the
        content of both, a folder with `images_background` and `images_evaluation`, or the parent folder of one of
        these.
      cache_dir: the folder of the cached array (25 MB); None selects `cache.default_folder()`.
      resampling: the filter for resizing from 105x105 to 28x28 pixels, 'lanczos', 'box' or 'nearest'.

    Returns:
      The images and the names of all characters.

    Raises:
      DataError: if the data are missing, damaged, incomplete or not Omniglot.
      ValueError: for an unknown `resampling`.
    """
    validation.one_of("resampling", resampling, get_args(Resampling))
    source = find_source(data_dir)
    path = Path(cache_dir or cache.default_folder()) / f"omniglot-{SIZE}-{resampling}.npz"
    cached = cache.read(path, _digest_of_arrays)
    if cached is not None and str(cached["sha256"]) == IMAGES_SHA256[resampling]:
        return Omniglot(cached["images"], tuple(cached["names"].tolist()))
    if cached is not None:
        print(f"The cache {path} does not hold the images of Omniglot and is built again.")
    data = resize_drawings(read_drawings(source), resampling)
    cache.write(path, {"images": data.images, "names": np.array(data.names), "sha256": np.array(digest(data))})
    return data


def split(name: SplitName, names: Iterable[str]) -> Splits:
    """Divides the characters into training, validation and test.

    Args:
      name: 'paper': 1,100 / 100 / 423 characters, shuffled with a fixed seed. Finn et al. shuffled a directory listing
        of unknown order, so their split is not reproducible. 'vinyals': 1,028 / 172 / 423 characters, the split of
        Vinyals et al. (2016) from the lists of Torchmeta.
      names: the names of the characters, `Omniglot.names`.

    Returns:
      Indices into `names`.

    Raises:
      ValueError: for an unknown `name`.

    Example:
      >>> names = [f"part/alphabet/character{number}" for number in range(1623)]
      >>> [len(indices) for indices in split("paper", names)]
      [1100, 100, 423]

    References:
      Finn, Abbeel and Levine (2017), arXiv:1703.03400, section 5.2.
      Vinyals et al. (2016), Matching Networks for One Shot Learning, arXiv:1606.04080.
    """
    validation.one_of("split", name, get_args(SplitName))
    names = tuple(names)
    if name == "paper":
        # NumPy guarantees that the stream of RandomState never changes.
        order = np.random.RandomState(1).permutation(len(names))
        return Splits(order[:1100], order[1100:1200], order[1200:])
    rules = json.loads(Path(__file__).with_name("omniglot_vinyals.json").read_text())
    # Each alphabet belongs to one split, except for the characters that `characters` lists.
    alphabets = {alphabet: part for part in ("train", "val", "test") for alphabet in rules[part]}
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for index, path in enumerate(names):
        alphabet, character = path.split("/")[1:]
        parts[rules["characters"].get(f"{alphabet}/{character}") or alphabets[alphabet]].append(index)
    return Splits(*(np.array(parts[part]) for part in ("train", "val", "test")))


# Finding and reading the source


def find_source(data_dir: str | Path) -> Path | tuple[Path, ...]:
    """Finds the form of Omniglot that `data_dir` holds; see `load`.

    Returns:
      A TFDS directory, the folder of the unpacked archives, or a tuple of archives.

    Raises:
      DataError: if `data_dir` does not exist or holds no Omniglot.
    """
    root = Path(data_dir)
    if not root.exists():
        raise DataError(f"The data directory {root} does not exist. {HOW}")
    if root.is_file():
        return (root,)
    for folder in (root, root / "omniglot", root / "3.0.0", root / "omniglot" / "3.0.0", root / "python"):
        if (folder / "dataset_info.json").is_file() and (folder / "features.json").is_file():
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
"""`{name of the character: drawings}`; drawings are bool `[20, 105, 105]`, True for paper."""


def read_drawings(source: Path | tuple[Path, ...]) -> Drawings:
    """Reads all drawings at full size, sorts the drawings, and checks their hash against `CONTENT_SHA256`.

    Args:
      source: the result of `find_source`.

    Returns:
      The drawings of each character.

    Raises:
      DataError: if a file cannot be read, if a character or drawing is missing, or if the hash differs. The message
        names the file or the character.
    """
    # Read the drawings.
    if isinstance(source, Path) and (source / "features.json").is_file():
        found = _from_tfds(source)
    else:
        found = _from_files(source)
    characters: dict[str, list[np.ndarray]] = {}
    for name, drawing in found:
        characters.setdefault(name, []).append(drawing)
    # Check that no character and no drawing is missing.
    where = _describe(source)
    _check_complete({name: len(drawings) for name, drawings in characters.items()}, where)
    # Sort characters by name, and drawings by pixels.
    ordered = {
        name: np.stack(sorted(characters[name], key=lambda drawing: np.packbits(drawing).tobytes()))
        for name in sorted(characters)
    }
    # Check the content.
    digest = hashlib.sha256()
    for name, stack in ordered.items():
        digest.update(name.encode() + b"\0" + np.packbits(stack).tobytes())
    if digest.hexdigest() != CONTENT_SHA256:
        raise DataError(
            f"The drawings in {where} are not those of Omniglot: expected the content hash {CONTENT_SHA256}, but got "
            f"{digest.hexdigest()}. {HOW}"
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


def _from_files(source: Path | tuple[Path, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """Reads the drawings in archives, or in the folder of the unpacked archives."""
    with contextlib.ExitStack() as stack:
        trees = [stack.enter_context(open_tree(path)) for path in ((source,) if isinstance(source, Path) else source)]
        files = [
            (tree, name)
            for tree in trees
            for name in tree.images()
            if name.endswith(".png") and PurePosixPath(name).parts[-4:-3] in [(part,) for part in PARTS]
        ]
        # Report missing drawings before an image is decoded.
        _check_complete(Counter(_character(name) for _, name in files), _describe(source))
        for tree, name in files:
            where = f"{tree.where}/{name}" if tree.path.is_dir() else f"{name} in {tree.where}"
            yield _character(name), _decode(tree.read(name), where)


def _from_tfds(root: Path) -> Iterator[tuple[str, np.ndarray]]:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(root)
        name_of = builder.info.features["alphabet"].int2str
        for split_name, part in zip(("train", "test"), PARTS):
            # TFDS would decode the images without a bound on their size.
            source = builder.as_data_source(split_name, decoders={"image": tfds.decode.SkipDecoding()})
            for example in source:
                character = f"{part}/{name_of(example['alphabet'])}/character{example['alphabet_char_id'] + 1:02d}"
                yield character, _decode(example["image"], f"of {character} in {root}")
    except DataError:
        raise
    except Exception as error:  # The readers of TFDS raise RuntimeError and other errors.
        raise DataError(f"TensorFlow Datasets cannot read {root}: {error}. {HOW}") from error


def _character(path: str) -> str:
    """Returns `<part>/<alphabet>/<character>` from the path of a drawing."""
    return "/".join(PurePosixPath(path).parts[-4:-1])


def _decode(png: bytes, where: str) -> np.ndarray:
    with open_image(png, where, ("PNG",), largest=SOURCE_SIZE**2) as image:
        drawing = np.asarray(image.convert("1"))
    if drawing.shape != (SOURCE_SIZE, SOURCE_SIZE):
        raise DataError(f"The image {where} has shape {drawing.shape}, but the images of Omniglot are 105x105. {HOW}")
    return drawing


def resize_drawings(drawings: Drawings, resampling: Resampling) -> Omniglot:
    """Resizes the drawings of each character to 28x28 pixels.

    Args:
      drawings: the result of `read_drawings`.
      resampling: the filter, 'lanczos', 'box' or 'nearest'.

    Returns:
      Images and names, in the order of `drawings`.
    """
    from PIL import Image

    method = Image.Resampling[resampling.upper()]
    images = np.empty((len(drawings), DRAWINGS, SIZE, SIZE), np.uint8)
    for row, character in zip(images, drawings.values()):
        for image, drawing in zip(row, character):
            # Convert to 8 bits: Pillow ignores the filter for 1-bit images.
            grey = Image.fromarray(drawing.astype(np.uint8) * 255)
            image[:] = np.asarray(grey.resize((SIZE, SIZE), method))
    return Omniglot(images, tuple(drawings))


def digest(data: Omniglot) -> str:
    """Returns the SHA-256 of the names and the 28x28 images."""
    return hashlib.sha256("\n".join(data.names).encode() + data.images.tobytes()).hexdigest()


def _digest_of_arrays(arrays: cache.Arrays) -> str:
    return digest(Omniglot(arrays["images"], tuple(arrays["names"].tolist())))
