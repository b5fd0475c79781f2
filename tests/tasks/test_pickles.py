"""Pickled data sets: the common forms are read, and no function that a pickle names is called."""

import pickle
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from helpers.pictures import assert_same, small, write

from maml_jax.tasks import image_sources
from maml_jax.tasks.cache import DataError
from maml_jax.tasks.images import load


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    return load(write(root / "data", small()), root / "cache", size=8)


@pytest.fixture
def contents(expected):
    """`{split: content}`: pickles with the images in reverse order and the indices of each class."""
    contents = {}
    for split in image_sources.SPLITS:
        data = getattr(expected, split)
        pixels = data.images[::-1].copy()
        last = len(pixels) - 1
        classes = {
            name: [int(last - first - number) for number in range(count)]
            for name, first, count in zip(expected.names[split], data.first, data.counts)
        }
        contents[split] = {"image_data": pixels, "class_dict": classes}
    return contents


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickles_with_class_names_are_read(contents, expected, protocol, tmp_path):
    for split, content in contents.items():
        path = tmp_path / f"mini-imagenet-cache-{split}.pkl"
        path.write_bytes(pickle.dumps(content, protocol))
    assert_same(load(tmp_path, tmp_path / "cache", size=8), expected)


def test_pickles_with_labels_are_read(contents, expected, tmp_path):
    number = 0
    for split, content in contents.items():
        labels = np.zeros(len(content["image_data"]), np.int64)
        for number, indices in enumerate(content["class_dict"].values(), number + 1):
            labels[indices] = number
        images = np.asfortranarray(content["image_data"])
        content = OrderedDict(data=images, labels=labels if split == "train" else labels.tolist())
        (tmp_path / f"CIFAR_FS_{split}.pickle").write_bytes(pickle.dumps(content))
    # Some data sets have more images of the training classes in a file with this name.
    (tmp_path / "CIFAR_FS_train_phase_val.pickle").write_bytes(b"")
    data = load(tmp_path, tmp_path / "cache", size=8)
    assert data.names == {"train": ("1", "2"), "val": ("3",), "test": ("4", "5")}
    for split in image_sources.SPLITS:
        assert getattr(data, split).counts == getattr(expected, split).counts
        # The images of a class have the order of the array, and the array is reversed.
        first = getattr(expected, split).images[: getattr(data, split).counts[0]]
        np.testing.assert_array_equal(getattr(data, split).images[: len(first)], first[::-1])


def test_pickles_of_python_2_are_read(expected, tmp_path):
    """Python 2 pickles bytes with the opcodes SHORT_BINSTRING and BINSTRING, here written by hand."""
    for split in image_sources.SPLITS:
        data = getattr(expected, split)

        def text(value):
            return b"U" + bytes([len(value)]) + value.encode()

        def integer(number):
            return b"J" + struct.pack("<i", number)

        shape = b"(" + b"".join(map(integer, data.images.shape)) + b"t"
        array = (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + integer(0) + b"t" + text("b") + b"tR("
            + integer(1) + shape + b"cnumpy\ndtype\n(" + text("u1") + integer(0) + integer(1) + b"tR("
            + integer(3) + text("|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb" + b"I00\n"
            + b"T" + struct.pack("<i", data.images.nbytes) + data.images.tobytes() + b"tb"
        )  # fmt: skip
        classes = b"}"
        for name, first, count in zip(expected.names[split], data.first, data.counts):
            members = b"".join(map(integer, range(first, first + count)))
            classes += text(name) + b"(" + members + b"ls"
        content = b"\x80\x02}" + text("image_data") + array + b"s" + text("class_dict") + classes + b"s."
        (tmp_path / f"cache-{split}.pkl").write_bytes(content)
    assert_same(load(tmp_path, tmp_path / "cache", size=8), expected)


def test_pickles_that_call_functions_raise(contents, tmp_path):
    touched = tmp_path / "touched"

    class Evil:
        def __reduce__(self):
            return Path.touch, (touched,)

    class Eval:
        def __reduce__(self):
            return eval, (f"open({str(touched)!r}, 'w')",)

    for split, content in contents.items():
        (tmp_path / f"{split}.pkl").write_bytes(pickle.dumps(content))
    pickle.loads(pickle.dumps(Eval())).close()
    touched.unlink()  # The attack works with the standard library.
    for attack, function in (
        (Evil(), r"pathlib.*\.(Path|getattr|touch)|builtins\.getattr"),
        (Eval(), r"builtins\.eval"),
    ):
        content = pickle.dumps({**contents["train"], "class_dict": attack})
        (tmp_path / "train.pkl").write_bytes(content)
        with pytest.raises(DataError, match=f"train.pkl in {tmp_path} calls ({function}), which is not allowed"):
            load(tmp_path, tmp_path / "cache", size=8)
    assert not touched.exists() and not (tmp_path / "cache").exists()


def test_wrong_contents_raise(contents, tmp_path):
    images, classes = contents["train"].values()
    cases = [
        ({"data": images, "labels": [0] * 4}, "holds 5 images, but 4 labels"),
        ({"data": images, "labels": ["ant"] * 5}, "'labels' .* must be a list of integers"),
        ({"pixels": images}, "must hold a dict with .* but holds a dict of pixels"),
        ([1, 2], "but holds a value of type list"),
        ({"image_data": images[..., 0], "class_dict": classes}, r"uint8 array of shape \[n, height, width, 3\]"),
        ({"image_data": images.astype(float), "class_dict": classes}, "float64"),
        ({"image_data": images, "class_dict": {"ant": [5]}}, "Class ant .* beyond the 5 images"),
        ({"image_data": images, "class_dict": {"ant": [0, 1], "bee": [1]}}, "Class bee .* listed more than once"),
        ({"image_data": images, "class_dict": {"ant": [0, 0]}}, "Class ant .* listed more than once"),
        ({"image_data": images, "class_dict": {"ant": []}}, "Class ant .* at least 1, found 0"),
        ({"image_data": np.array([None, "x"]), "class_dict": {}}, "damaged, or holds more .*'O8'"),
    ]
    for split, content in contents.items():
        (tmp_path / f"{split}.pkl").write_bytes(pickle.dumps(content))
    intact = pickle.dumps(contents["train"])
    for content, message in [*cases, (intact[:-20], "is damaged"), (b"", "is damaged"), (b"junk", "is damaged")]:
        (tmp_path / "train.pkl").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
        with pytest.raises(DataError, match=message):
            load(tmp_path, tmp_path / "cache", size=8)
    (tmp_path / "train.pkl").write_bytes(intact)
    (tmp_path / "val.pkl").write_bytes(intact)
    with pytest.raises(DataError, match="2 classes are in both train and val: ant, bee"):
        load(tmp_path, tmp_path / "cache", size=8)
    (tmp_path / "old_train.pkl").write_bytes(intact)
    with pytest.raises(DataError, match=r"more than one pickle for train: old_train.pkl, train.pkl"):
        load(tmp_path, tmp_path / "cache", size=8)
