"""Pickled data sets: the common forms are read, and no function that a pickle names is called."""

import io
import pickle
import struct
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from helpers.pictures import assert_same, small, write

from maml_jax.tasks import image_sources, pickles
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
        name = {"val": "validation"}.get(split, split)
        (tmp_path / f"CIFAR_FS_{name}.pickle").write_bytes(pickle.dumps(content))
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


def nested(kind, depth=60):
    """A pickle of a few hundred bytes: a value that holds the value before twice, `depth` times."""
    value = kind(())
    for _ in range(depth):
        value = {0: value, 1: value} if kind is dict else kind((value, value))
    return value


def put(index):
    """A pickle that stores None at an index of the memo."""
    return b"\x80\x02Nr" + struct.pack("<I", index) + b"."


def copies(size, count):
    """A pickle of `count` arrays that share `size` bytes."""
    kind = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbq\x010"
    data = b"T" + struct.pack("<i", size) + b"x" * size + b"q\x020"
    array = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01K\x00h\x01\x89h\x02tb".replace(
        b"K\x00h", b"J" + struct.pack("<i", size) + b"\x85h"
    )
    return b"\x80\x02" + kind + data + b"(" + array * count + b"l."


def called(function, *arguments):
    """A pickle that calls a stand-in 2,000 times with the same arguments, which it holds once."""
    head = pickle.dumps(arguments, 2)[:-1] + b"q\xff0"
    return head + b"c" + "\n".join(function).encode() + b"\nq\xfe0(" + b"h\xfeh\xffR" * 2000 + b"l."


TUPLES = pickle.dumps(nested(tuple), 2)[2:-1]
"""Operations that make a tuple whose hash takes time without end."""
LARGE = {
    "bytes": b"\x80\x05B" + struct.pack("<I", 2**31 - 1),
    "long bytes": b"\x80\x05\x8e" + struct.pack("<Q", 2**33),
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**33),
    "frame": b"\x80\x05\x95" + struct.pack("<Q", 2**33),
    "key": b"\x80\x02}" + TUPLES + b"Ns.",
    "keys": b"\x80\x02}(" + TUPLES + b"Nu.",
    "keys of dict": b"\x80\x02(" + TUPLES + b"Nd.",
    "keys of OrderedDict": called(("collections", "OrderedDict"), [[nested(tuple), 0]]),
    "set": b"\x80\x04\x8f(" + TUPLES + b"\x90.",
    "frozenset": b"\x80\x04(" + TUPLES + b"\x91.",
    "keys with one hash": pickle.dumps({2**61 - 1: 0}),
    "encoded texts": called(("_codecs", "encode"), "x" * 50_000, "latin1"),
    "copied dicts": called(("collections", "OrderedDict"), [["a", 0]] * 5_000),
    "arrays": copies(50_000, 50),
}


@pytest.fixture
def most_memory():
    """Returns the largest number of bytes that Python held during the test."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@pytest.mark.parametrize("name", LARGE)
def test_short_pickles_of_large_values_raise(name, most_memory):
    with pytest.raises(DataError, match=r"x.pkl is damaged, or holds more"):
        pickles.load(io.BytesIO(LARGE[name]), "x.pkl")
    assert most_memory() < 4e6


def test_values_with_many_references_are_built_once(tmp_path, most_memory):
    assert pickles.load(io.BytesIO(put(2**27)), "x.pkl") is None
    assert most_memory() < 1e6
    value = pickles.load(io.BytesIO(pickle.dumps(nested(dict))), "x.pkl")
    for _ in range(60):
        assert value[0] is value[1]
        value = value[0]
    itself = {}
    itself["a"] = itself
    value = pickles.load(io.BytesIO(pickle.dumps(itself)), "x.pkl")
    assert value["a"] is value
    # A file is not read beyond its end.
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x05B" + struct.pack("<I", 2**31 - 1))
    with open(path, "rb") as file, pytest.raises(DataError, match="bytes are missing"):
        pickles.load(file, "x.pkl")


def test_too_many_values_raise(monkeypatch):
    monkeypatch.setattr(pickles, "LARGEST_LENGTH", 100)
    with pytest.raises(DataError, match="more than 100 values"):
        pickles.load(io.BytesIO(b"}" * 200), "x.pkl")


def test_labels_are_grouped_in_time_that_does_not_grow_with_the_classes():
    split = {"data": np.zeros((20_000, 1, 1, 3), np.uint8), "labels": list(range(20_000))[::-1]}
    found = pickles.images(io.BytesIO(pickle.dumps(split)), "x.pkl").classes
    assert len(found) == 20_000 and found["7"].tolist() == [19_992]
