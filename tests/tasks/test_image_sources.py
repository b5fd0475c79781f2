"""Image data sets in all forms give the same images, and errors name the file."""

import struct
import warnings
import zipfile
import zlib

import pytest
from helpers.pictures import assert_same, class_folders, png, small, write, zipped

from maml_jax.tasks import image_sources, tree
from maml_jax.tasks.cache import DataError
from maml_jax.tasks.images import load

OTHERS = tuple(f"kind{number:02d}" for number in range(25))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    return load(write(root / "data", small()), root / "cache", size=8)


@pytest.mark.parametrize(
    "files",
    [
        small("images/{label}{number}.png", "{label}{number}.png", ""),
        small("{label}/{number}.png", "{number}.png", ""),
        {f"mine/{name}": content for name, content in small().items()} | {"__MACOSX/mine/._train.csv": "x"},
        class_folders(),
    ],
    ids=["flat", "folders by label", "one outer folder", "class folders"],
)
@pytest.mark.parametrize("form", ["folder", "archive"])
def test_every_form_gives_the_same_images(files, form, expected, tmp_path):
    source = write(tmp_path / "a", files) if form == "folder" else zipped(tmp_path / "a.zip", files)
    data = load(source, tmp_path, size=8)
    assert_same(data, expected)
    assert data.names == {"train": ("ant", "bee"), "val": ("cat",), "test": ("dog", "elk")}
    assert data.train.counts == (3, 2) and data.train.images.shape == (5, 8, 8, 3) and data.source == str(source)


def test_class_folders_without_splits_are_divided_in_a_fixed_order(tmp_path):
    source = write(tmp_path / "data", {f"{label}/{n}.png": png(n) for label in OTHERS for n in range(2)})
    data = load(source, tmp_path, size=8)
    assert [len(data.names[split]) for split in image_sources.SPLITS] == [16, 4, 5]
    assert sorted(sum(data.names.values(), ())) == list(OTHERS)
    # The same on every machine and with every version of NumPy.
    assert data.names["val"] == ("kind00", "kind15", "kind23", "kind24")
    undivided = load(source, tmp_path, size=8, division="none")
    assert undivided.names == {"train": OTHERS, "val": (), "test": ()}
    assert undivided.val.images.shape == (0, 8, 8, 3)


def test_classes_can_have_the_names_of_splits(tmp_path):
    files = {f"{label}/{n}.png": png(n) for label in (*OTHERS, "train", "val") for n in range(2)}
    data = load(write(tmp_path / "data", files), tmp_path, size=8)
    assert {"train", "val"} < {name for names in data.names.values() for name in names}


def bomb(side=20_000):
    """A PNG of a few bytes with a header of `side` rows and columns: a decompression bomb."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def changed(**parts):
    """The small data set with some files replaced. A file with content None is removed."""
    names = {"train": "splits/train.csv", "val": "splits/val.csv", "image": "images/cat/cat1.png"}
    files = {**small(), **{names.get(part, part): content for part, content in parts.items()}}
    return {name: content for name, content in files.items() if content is not None}


TRAIN = small()["splits/train.csv"]
BAD = {
    "missing files": (
        changed(train=TRAIN + "".join(f"ant/no{n}.png,ant\n" for n in range(7))),
        r"list 20 files, of which 7 are missing: ant/no0.png, ant/no1.png, .*, ant/no4.png and 2 more",
    ),
    "escaping names": (
        changed(train=TRAIN + "../../secret.png,ant\n"),
        r"list 14 files, of which 1 are missing: \.\./\.\./secret.png",
    ),
    "overlap": (
        changed(train=TRAIN + "ant/new.png,dog\n", **{"images/ant/new.png": png(0)}),
        "1 classes are in both train and test: dog",
    ),
    "overlap beside a space": (
        changed(train=TRAIN + "ant/new.png, dog\n", **{"images/ant/new.png": png(0)}),
        "1 classes are in both train and test: dog",
    ),
    "duplicate row": (
        changed(train=TRAIN + "ant/ant0.png,ant\n"),
        "Line 7 of splits/train.csv in .* lists ant/ant0.png, which line 6 of splits/train.csv also lists",
    ),
    "in two splits": (
        changed(val="filename,label\nant/ant0.png,cat\n"),
        "Line 2 of splits/val.csv in .* lists ant/ant0.png, which line 6 of splits/train.csv also lists",
    ),
    "unknown columns": (changed(val="file,class\na,b\n"), "must have the columns filename,label, but has file,class"),
    "no columns": (changed(val=""), "must have the columns filename,label, but has none"),
    "short row": (changed(val="filename,label\ncat/cat0.png\n"), "Line 2 of splits/val.csv .* 'cat/cat0.png'"),
    "not text": (changed(val=b"\xff\xfe\x00"), "splits/val.csv .* is not a CSV in UTF-8"),
    "no list": (changed(val=None), "a CSV splits/train.csv, but none for val"),
    "no rows": (changed(val="filename,label\n"), "Split val of .* has no classes"),
    "damaged image": (
        changed(image=small()["images/cat/cat1.png"][:60]),
        "The image images/cat/cat1.png .* is damaged",
    ),
    "no image": (changed(image=b"not an image"), "The image images/cat/cat1.png .* is damaged"),
    "bomb": (changed(image=bomb()), "The image images/cat/cat1.png .* is refused: .*decompression bomb"),
    "empty class": ({**class_folders(), "train/fox/": b""}, "Class fox of split train .* at least 1, found 0"),
    "no test folder": (
        {name: content for name, content in class_folders().items() if not name.startswith("test")},
        "a folder train, but none for test",
    ),
    "two classes": ({"a/0.png": png(0), "b/0.png": png(0)}, "has 2 classes, too few to divide"),
    "nothing": ({"readme.txt": b""}, "holds no data set of images"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_name_file_and_reason(case, tmp_path):
    files, message = BAD[case]
    source = zipped(tmp_path / "bad.zip", files)
    with pytest.raises(DataError, match=message) as error:
        load(source, tmp_path / "cache", size=8)
    assert str(source) in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_an_image_that_makes_pillow_warn_raises(tmp_path):
    source = write(tmp_path / "data", changed(image=bomb(10_000)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=r"cat1.png .* is refused: .*decompression bomb"):
            load(source, tmp_path, size=8)


def test_missing_damaged_and_too_large_files_raise(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"nowhere does not exist.*--data-dir"):
        load(tmp_path / "nowhere", tmp_path)
    intact, damaged = zipped(tmp_path / "intact.zip", small()), tmp_path / "damaged.zip"
    damaged.write_bytes(intact.read_bytes()[:-200])
    with pytest.raises(DataError, match=f"The archive {damaged} cannot be read"):
        load(damaged, tmp_path)
    flipped = bytearray(intact.read_bytes())
    flipped[flipped.index(b"IDAT") + 10] ^= 1
    damaged.write_bytes(flipped)
    with pytest.raises(DataError, match=f"The archive {damaged} cannot be read: .*CRC"):
        load(damaged, tmp_path)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(intact, "a") as archive:
        archive.writestr("images/ant/ant0.png", b"")
    with pytest.raises(DataError, match=r"images/ant/ant0.png more than once"):
        load(intact, tmp_path)
    monkeypatch.setattr(tree, "LARGEST_FILE", 100)
    with pytest.raises(DataError, match="bytes, but at most 100 are read"):
        load(write(tmp_path / "data", small()), tmp_path)
