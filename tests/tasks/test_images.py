"""Image collections as data sets, in each of their forms, whole and damaged."""

import csv
import io
import json
import re
import resource
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.pictures import CLASSES, class_folders, png, same, small, write, zipped
from PIL import Image

from maml_jax.tasks import cache, image_sources, images, published
from maml_jax.tasks.cache import DataError
from maml_jax.tasks.images import load

OTHERS = tuple(f"kind{number:02d}" for number in range(25))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    return load(write(root / "data", small()), root / "cache", size=8)


def test_caltech_as_archive_and_as_folders(shared_data, tmp_path):
    """In MiniImagenet's form: the whole archive; and of some images a folder with CSVs, and class folders."""
    archive = shared_data / "caltech101" / "caltech101_84.zip"
    data = load(archive, tmp_path / "cache")
    described = data.describe()
    sizes = {split: (described[split]["classes"], described[split]["images"]) for split in image_sources.SPLITS}
    assert sizes == {"train": (63, 5521), "val": (16, 948), "test": (20, 1338)}
    assert data.published is None and data.train.images.shape == (5521, 84, 84, 3)
    same(data, load(archive.parent, tmp_path / "cache"))  # The only archive of a folder, by now from the cache.
    some = {}
    with zipfile.ZipFile(archive) as file:
        for split in image_sources.SPLITS:
            rows = list(csv.DictReader(io.TextIOWrapper(file.open(f"splits/{split}.csv"))))
            listed = {label: [row["filename"] for row in rows if row["label"] == label] for label in data.names[split]}
            assert tuple(map(len, listed.values())) == getattr(data, split).counts
            some[split] = {name: label for label, names in listed.items() for name in sorted(names)[:3]}
        content = {name: file.read(f"images/{name}") for names in some.values() for name in names}
    unpacked, folders = {}, {}
    for split, names in some.items():
        rows = [f"{name},{label}" for name, label in names.items()]
        unpacked[f"splits/{split}.csv"] = "\n".join(["filename,label", *rows])
        unpacked |= {f"images/{name}": content[name] for name in names}
        folders |= {f"{split}/{label}/{Path(name).name}": content[name] for name, label in names.items()}
    read = load(write(tmp_path / "unpacked", unpacked), tmp_path / "cache")
    same(read, load(write(tmp_path / "folders", folders), tmp_path / "cache"))
    for split in image_sources.SPLITS:
        whole, part = getattr(data, split), getattr(read, split)
        assert part.counts == (3,) * len(whole.counts)
        np.testing.assert_array_equal(part.images, whole.images[(whole.first[:, None] + np.arange(3)).ravel()])
    first = sorted(name for name, label in some["train"].items() if label == data.names["train"][0])[0]
    with Image.open(io.BytesIO(content[first])) as image:  # Of 84x84 already, and so as it is.
        np.testing.assert_array_equal(data.train.images[0], np.asarray(image.convert("RGB")))


def test_the_readme_tells_how(tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "images.load" in block)
    write(tmp_path / "data/birds", {f"{label}/{n}.png": png(n) for label in OTHERS[:10] for n in range(16)})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    scope = {"jax": jax}
    exec(block, scope)
    assert "'classes': 6, 'images': 96" in capsys.readouterr().out and callable(scope["draw"])
    (tmp_path / "data/birds/kind03/7.png").unlink()
    with pytest.raises(DataError, match=r"Class kind03 .* expected at least 16, found 15"):
        exec(block, scope)


@pytest.mark.parametrize(
    "files",
    [
        small("images/{label}{number}.png", "{label}{number}.png", ""),
        small("{label}/{number}.png", "{number}.png", ""),
        {f"mine/{name}": content for name, content in small().items()} | {"__MACOSX/mine/._train.csv": "x"},
        class_folders(),
    ],
    ids=["flat", "named by label", "one folder in all", "class folders"],
)
@pytest.mark.parametrize("form", ["folder", "archive"])
def test_every_layout_gives_the_same(files, form, expected, tmp_path):
    source = write(tmp_path / "a", files) if form == "folder" else zipped(tmp_path / "a.zip", files)
    data = load(source, tmp_path, size=8)
    same(data, expected)
    assert data.names == {"train": ("ant", "bee"), "val": ("cat",), "test": ("dog", "elk")}
    assert data.train.counts == (3, 2) and data.train.images.shape == (5, 8, 8, 3) and data.source == str(source)


def test_images_are_resized_with_the_filter_asked_for(expected, tmp_path):
    source = write(tmp_path / "data", small())
    with Image.open(source / "images/bee/bee1.png") as image:
        for data, filter in (
            (expected, Image.Resampling.LANCZOS),
            (load(source, tmp_path, size=8, resampling="box"), Image.Resampling.BOX),
        ):
            np.testing.assert_array_equal(data.train.images[4], np.asarray(image.resize((8, 8), filter)))


def test_class_folders_without_splits_are_divided_once_and_for_all(tmp_path):
    source = write(tmp_path / "data", {f"{label}/{n}.png": png(n) for label in OTHERS for n in range(2)})
    data = load(source, tmp_path, size=8)
    assert [len(data.names[split]) for split in image_sources.SPLITS] == [16, 4, 5]
    assert sorted(sum(data.names.values(), ())) == list(OTHERS)
    assert data.names["val"] == ("kind00", "kind15", "kind23", "kind24")  # Whatever the machine or version.
    whole = load(source, tmp_path, size=8, division="none")
    assert whole.names == {"train": OTHERS, "val": (), "test": ()} and whole.val.images.shape == (0, 8, 8, 3)


def test_classes_may_be_called_as_splits_are(tmp_path):
    files = {f"{label}/{n}.png": png(n) for label in (*OTHERS, "train", "val") for n in range(2)}
    data = load(write(tmp_path / "data", files), tmp_path, size=8)
    assert {"train", "val"} < {name for names in data.names.values() for name in names}


def test_a_camera_that_was_held_upright_is_seen_so(tmp_path):
    """By the note of its orientation, which is that the right side was up."""
    upright = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    exif, files = Image.Exif(), {}
    transverse = np.rot90(upright, 2).swapaxes(0, 1)
    kinds = ((6, np.rot90(upright)), (3, upright[::-1, ::-1]), (7, transverse), (9, upright))
    for label, (held, turned) in zip(OTHERS, kinds):
        exif[0x0112] = held
        file = io.BytesIO()
        Image.fromarray(turned).save(file, "PNG", exif=exif)
        files[f"{label}/0.png"] = file.getvalue()
    data = load(write(tmp_path / "data", files), tmp_path, size=8, division="none")
    for picture in data.train.images:
        np.testing.assert_array_equal(picture, upright)


def test_colours_of_every_kind_become_rgb(tmp_path):
    modes = ("RGB", "L", "1", "P", "CMYK", "RGBA", "LA")
    files = {f"{mode}/0.{'tif' if mode == 'CMYK' else 'png'}": png(7, mode, (8, 8)) for mode in modes}
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    file = io.BytesIO()
    Image.fromarray(deep).save(file, "PNG")
    data = load(write(tmp_path / "data", {**files, "deep/0.png": file.getvalue()}), tmp_path, size=8, division="none")
    found = dict(zip(data.names["train"], data.train.images))
    np.testing.assert_array_equal(found["CMYK"], found["RGB"])
    np.testing.assert_array_equal(found["RGBA"], found["RGB"])
    grey = np.asarray(Image.fromarray(found["RGB"]).convert("L"))
    for mode in ("L", "LA"):
        np.testing.assert_array_equal(found[mode], grey[..., None].repeat(3, 2))
    assert set(np.unique(found["1"])) == {0, 255}
    assert np.abs(found["P"].astype(int) - found["RGB"]).mean() < 40  # A palette is near, not its indices.
    np.testing.assert_array_equal(found["deep"][..., 0], deep // 256)


class TestCache:
    def test_is_used_until_the_source_changes(self, tmp_path, monkeypatch):
        source, kept = write(tmp_path / "data", small()), tmp_path / "cache"
        archive = zipped(tmp_path / "data.zip", small())
        first = load(source, kept, size=8)
        load(archive, kept, size=8)
        with monkeypatch.context() as patch:
            patch.setattr(images, "_decoded", lambda *_: pytest.fail("It is in the cache."))
            same(load(source, kept, size=8), first)
            same(load(archive, kept, size=8), first)
            with pytest.raises(DataError, match=r"Class bee of split train .* expected at least 3, found 2"):
                load(source, kept, size=8, least=3)
        changed = {**small(), "images/ant/ant0.png": png(1)}
        zipped(archive, changed)
        write(source, changed)
        for data in (load(archive, kept, size=8), load(source, kept, size=8)):
            assert data.sha256["train"] != first.sha256["train"] and data.sha256["val"] == first.sha256["val"]
        (source / "images/ant/ant0.png").unlink()
        with pytest.raises(DataError, match="1 files of 13 that are not there"):
            load(source, kept, size=8)

    def test_damage_is_noticed(self, expected, tmp_path, capsys):
        source, kept = write(tmp_path / "data", small()), tmp_path / "cache"
        load(source, kept, size=8)
        (path,) = kept.iterdir()
        with np.load(path) as stored:
            arrays = dict(stored)
        np.savez(path, **{**arrays, "val_images": arrays["val_images"] ^ 1})
        same(load(source, kept, size=8), expected)
        assert f"The cache {path} does not match its checksum" in capsys.readouterr().out
        path.write_bytes(path.read_bytes()[:-100])
        same(load(source, kept, size=8), expected)
        assert f"The cache {path} is damaged" in capsys.readouterr().out

    def test_a_disk_that_fills_leaves_nothing(self, tmp_path):
        """With the size of files limited, writing fails midway as it does on a full disk."""
        source, kept = write(tmp_path / "data", small()), tmp_path / "cache"
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with pytest.raises(DataError, match=r"The cache .*images-64-lanczos.* cannot be written .* 0 MB") as error:
                load(source, kept, size=64)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "--cache-dir" in str(error.value) and list(kept.iterdir()) == []
        load(source, kept, size=64)


def bomb(side=20_000):
    """A PNG of a few bytes that says it has that many rows and columns."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def changed(**parts):
    """The small data set with some files replaced, or taken away where None."""
    names = {"train": "splits/train.csv", "val": "splits/val.csv", "image": "images/cat/cat1.png"}
    files = {**small(), **{names.get(part, part): content for part, content in parts.items()}}
    return {name: content for name, content in files.items() if content is not None}


TRAIN = small()["splits/train.csv"]
BAD = {
    "missing files": (
        changed(train=TRAIN + "".join(f"ant/no{n}.png,ant\n" for n in range(7))),
        r"name 7 files of 20 that are not there: ant/no0.png, ant/no1.png, .*, ant/no4.png and 2 more",
    ),
    "escaping names": (changed(train=TRAIN + "../../secret.png,ant\n"), r"name 1 files of 14 .*: \.\./\.\./secret.png"),
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
        "Line 7 of splits/train.csv in .* lists ant/ant0.png, which line 6 of splits/train.csv lists already",
    ),
    "in two splits": (
        changed(val="filename,label\nant/ant0.png,cat\n"),
        "Line 2 of splits/val.csv in .* lists ant/ant0.png, which line 6 of splits/train.csv lists already",
    ),
    "unknown columns": (changed(val="file,class\na,b\n"), "must have the columns filename,label, but has file,class"),
    "no columns": (changed(val=""), "must have the columns filename,label, but has none"),
    "short row": (changed(val="filename,label\ncat/cat0.png\n"), "Line 2 of splits/val.csv .* 'cat/cat0.png'"),
    "not text": (changed(val=b"\xff\xfe\x00"), "splits/val.csv .* is no CSV in UTF-8"),
    "no list": (changed(val=None), "a CSV splits/train.csv, but none for val"),
    "no rows": (changed(val="filename,label\n"), "Split val of .* has no classes"),
    "broken image": (changed(image=small()["images/cat/cat1.png"][:60]), "The image images/cat/cat1.png .* is damaged"),
    "no image": (changed(image=b"not an image"), "The image images/cat/cat1.png .* is damaged"),
    "bomb": (changed(image=bomb()), "The image images/cat/cat1.png .* is refused: .*decompression bomb"),
    "empty class": ({**class_folders(), "train/fox/": b""}, "Class fox of split train .* at least 1, found 0"),
    "no test folder": (
        {name: content for name, content in class_folders().items() if not name.startswith("test")},
        "a folder train, but none for test",
    ),
    "two classes": ({"a/0.png": png(0), "b/0.png": png(0)}, "has 2 classes, too few to be divided"),
    "nothing": ({"readme.txt": b""}, "holds no images that could be a data set"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_told_exactly(case, tmp_path):
    files, message = BAD[case]
    source = zipped(tmp_path / "bad.zip", files)
    with pytest.raises(DataError, match=message) as error:
        load(source, tmp_path / "cache", size=8)
    assert str(source) in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_where_pillow_would_only_warn_is_refused_too(tmp_path):
    source = write(tmp_path / "data", changed(image=bomb(10_000)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=r"cat1.png .* is refused: .*decompression bomb"):
            load(source, tmp_path, size=8)


def test_sources_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"nowhere does not exist.*--data-dir"):
        load(tmp_path / "nowhere", tmp_path)
    cut = tmp_path / "cut.zip"
    cut.write_bytes(zipped(tmp_path / "whole.zip", small()).read_bytes()[:-200])
    with pytest.raises(DataError, match=f"The archive {cut} cannot be read"):
        load(cut, tmp_path)
    flipped = bytearray((tmp_path / "whole.zip").read_bytes())
    flipped[flipped.index(b"IDAT") + 10] ^= 1
    cut.write_bytes(flipped)
    with pytest.raises(DataError, match=f"The archive {cut} cannot be read: .*CRC"):
        load(cut, tmp_path)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "whole.zip", "a") as archive:
        archive.writestr("images/ant/ant0.png", b"")
    with pytest.raises(DataError, match=r"images/ant/ant0.png more than once"):
        load(tmp_path / "whole.zip", tmp_path)
    monkeypatch.setattr(image_sources, "LARGEST_FILE", 100)
    with pytest.raises(DataError, match="bytes, but at most 100 are read"):
        load(write(tmp_path / "data", small()), tmp_path)
    for option in ({"size": 0}, {"resampling": "best"}, {"division": "mine"}, {"least": 0}, {"expect": "imagenet"}):
        with pytest.raises(ValueError, match=next(iter(option))):
            load(tmp_path / "nowhere", tmp_path, **option)


class TestPublished:
    def test_the_lists_are_the_published_ones(self, shared_data):
        listed = {}
        for split in image_sources.SPLITS:
            with open(shared_data / "splits" / "miniImagenet" / f"{split}.csv") as file:
                labels = [row["label"] for row in csv.DictReader(file)]
            listed[split] = {label: labels.count(label) for label in set(labels)}
        assert listed == published.counts_of("miniimagenet")
        cifar = shared_data / "splits" / "torchmeta" / "cifar100"
        fine = {split: json.loads((cifar / "cifar-fs" / f"{split}.json").read_text()) for split in image_sources.SPLITS}
        coarse = {split: json.loads((cifar / "fc100" / f"{split}.json").read_text()) for split in image_sources.SPLITS}
        everything = [pair for pairs in fine.values() for pair in pairs]
        for split in image_sources.SPLITS:
            assert {name for _, name in fine[split]} == set(published.LISTS["cifar-fs"][split])
            assert {name for kind, name in everything if kind in coarse[split]} == set(published.LISTS["fc100"][split])
        for name, known in published.LISTS.items():
            assert published.sha256(published.counts_of(name)) == known["sha256"]
            assert published.recognise(published.counts_of(name)) == name

    def test_differences_are_told(self):
        counts = published.counts_of("miniimagenet")
        published.check("miniimagenet", counts, "here")
        assert published.recognise(counts) == "miniimagenet"
        counts["train"]["n01532829"] = 599
        del counts["test"]["n01930112"]
        counts["val"]["mine"] = 31
        assert published.recognise(counts) is None
        with pytest.raises(DataError) as error:
            published.check("miniimagenet", counts, "here")
        assert str(error.value) == (
            "here is not MiniImagenet (Ravi and Larochelle 2017): class n01532829 of split train: expected 600 images, "
            "found 599; class mine of split val: expected 0 images, found 31; class n01930112 of split test: expected "
            "600 images, found 0."
        )
        numbered = {"train": {str(n): 600 for n in range(64)}, "val": {str(n): 600 for n in range(64, 79)}}
        numbered["test"] = {str(n): 600 for n in range(80, 99)} | {"99": 500}
        with pytest.raises(DataError, match=r"split val: expected 16 classes, found 15; class 99 .* 600 .* found 500"):
            published.check("cifar-fs", numbered, "here")

    def test_a_data_set_is_held_against_its_list(self, tmp_path, monkeypatch):
        lists = {split: list(labels) for split, labels in CLASSES.items()}
        counts = {split: dict.fromkeys(labels, 2) for split, labels in lists.items()}
        known = {"title": "Small", "images": 2, "sha256": published.sha256(counts), **lists}
        monkeypatch.setitem(published.LISTS, "small", known)
        files = {name: content for name, content in class_folders().items() if name[-5] in "01"}
        data = load(write(tmp_path / "data", files), tmp_path, size=8, expect="small")
        assert data.published == "small" and data.describe()["published"] == "Small"
        (tmp_path / "data/test/elk/elk0.png").unlink()
        with pytest.raises(DataError, match="class elk of split test: expected 2 images, found 1"):
            load(tmp_path / "data", tmp_path, size=8, expect="small")
        assert load(tmp_path / "data", tmp_path, size=8).published is None


def test_cache_of_another_content_is_not_taken(tmp_path):
    path = tmp_path / "it.npz"
    cache.write(path, {"a": np.arange(3), "sha256": np.array("x")})
    assert cache.read(path, lambda arrays: "y") is None
    read = cache.read(path, lambda arrays: "x")
    assert read is not None and read["a"].tolist() == [0, 1, 2]
