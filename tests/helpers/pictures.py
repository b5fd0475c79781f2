"""Small image data sets in files."""

import io
import zipfile

import numpy as np
from PIL import Image

from maml_jax.tasks import image_sources

CLASSES = {"train": ("ant", "bee"), "val": ("cat",), "test": ("dog", "elk")}
SIZES = {"ant": 3, "bee": 2, "cat": 2, "dog": 4, "elk": 2}


def png(seed, mode="RGB", size=(9, 7)):
    """A random image as the content of a file; CMYK becomes TIFF."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "TIFF" if mode == "CMYK" else "PNG")
    return file.getvalue()


def write(root, files):
    """Writes `{name: content}` below `root`."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def small(inside="images/{label}/{label}{number}.png", listed="{label}/{label}{number}.png", lists="splits/"):
    """A data set with a CSV file for each split, as `{name: content}`."""
    files = {}
    for split, labels in CLASSES.items():
        rows = ["filename,label"]
        for label in reversed(labels):
            for number in reversed(range(SIZES[label])):
                files[inside.format(label=label, number=number)] = png(100 * len(label) + 10 * ord(label[0]) + number)
                rows.append(listed.format(label=label, number=number) + f",{label}")
        files[f"{lists}{split}.csv"] = "\n".join(rows) + "\n"
    return files


def class_folders():
    """The images of `small` in train/, val/ and test/, with a folder for each class."""
    split_of = {label: split for split, labels in CLASSES.items() for label in labels}
    files = small("{label}/{label}{number}.png")
    return {
        f"{split_of[name.split('/')[0]]}/{name}": content for name, content in files.items() if name.endswith("png")
    }


def zipped(path, files, **options):
    """Writes `{name: content}` to a zip archive."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def assert_same(first, second):
    """Both data sets have the same names, hashes, sizes and pixels."""
    assert first.names == second.names and first.sha256 == second.sha256
    for split in image_sources.SPLITS:
        a, b = getattr(first, split), getattr(second, split)
        assert a.counts == b.counts
        np.testing.assert_array_equal(a.images, b.images)
