"""Lists in CSV, JSON and text divide a data set; a published division that is not read is never divided at random."""

import json
import unicodedata

import pytest
from helpers.pictures import CLASSES, SIZES, assert_same, class_folders, png, small, write, zipped

from maml_jax.tasks import image_sources, published
from maml_jax.tasks.cache import DataError
from maml_jax.tasks.images import load
from maml_jax.tasks.tree import open_tree


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    return load(write(root / "data", small()), root / "cache", size=8)


def images(folder):
    """The images of `small` in a folder for each class."""
    files = small(f"{folder}{{label}}/{{label}}{{number}}.png")
    return {name: content for name, content in files.items() if name.endswith("png")}


def json_lists():
    """The lists of Chen et al., with the paths of another machine."""
    names = sorted(SIZES)
    lists = {}
    for file, split in (("base", "train"), ("val", "val"), ("novel", "test")):
        rows = [
            (f"/home/a/CUB/images/{name}/{name}{n}.png", name) for name in CLASSES[split] for n in range(SIZES[name])
        ]
        lists[f"{file}.json"] = json.dumps(
            {
                "label_names": names,
                "image_names": [path for path, _ in rows],
                "image_labels": [names.index(name) for _, name in rows],
            }
        )
    return lists


def text_lists(folder="splits/bertinetto/"):
    return {f"{folder}{split}.txt": "\n".join(labels) + "\n" for split, labels in CLASSES.items()}


FORMS = {
    "csv with ./": small(listed="./{label}//{label}{number}.png"),
    "csv with backslashes": small(listed=".\\images\\{label}\\{label}{number}.png"),
    "json": images("images/") | json_lists(),
    "text": images("data/") | text_lists(),
    "text, one outer folder": {f"cifar-fs/{k}": v for k, v in (images("data/") | text_lists()).items()},
    "text beside class folders": images("") | text_lists(""),
    "valid": {name.replace("val/", "valid/"): content for name, content in class_folders().items()},
    "validation.csv": {name.replace("val.csv", "validation.csv"): content for name, content in small().items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_list_gives_the_same_images(form, expected, tmp_path, capsys):
    assert_same(load(write(tmp_path / "data", FORMS[form]), tmp_path, size=8), expected)
    assert_same(load(zipped(tmp_path / "data.zip", FORMS[form]), tmp_path, size=8), expected)
    assert capsys.readouterr().err == ""


ACCENT = "caf\u00e9"


def test_names_are_found_in_every_unicode_form(tmp_path):
    def decomposed(text):
        return unicodedata.normalize("NFD", text)

    files = {name.replace("cat", ACCENT): content for name, content in small().items()}
    files = {
        name: content if isinstance(content, bytes) else content.replace("cat", ACCENT)
        for name, content in files.items()
    }
    listed = {name: content if isinstance(content, bytes) else decomposed(content) for name, content in files.items()}
    stored = {decomposed(name): content for name, content in files.items()}
    first = load(write(tmp_path / "a", listed), tmp_path, size=8)
    assert first.names["val"] == (ACCENT,)
    assert_same(load(write(tmp_path / "b", stored), tmp_path, size=8), first)
    # Two forms of one name are one class, which may not be in two splits.
    folders = class_folders() | {f"train/{ACCENT}/0.png": png(0), f"test/{decomposed(ACCENT)}/1.png": png(1)}
    with pytest.raises(DataError, match=f"1 classes are in both train and test: {ACCENT}"):
        load(write(tmp_path / "c", folders), tmp_path, size=8)


UNREAD = {
    "base.json": (images("images/") | {"base.json": "[]"}, "a JSON list base.json, but none for val and test"),
    "another JSON": (
        images("images/") | dict.fromkeys(("base.json", "val.json", "novel.json"), '{"image_names": ["a"]}'),
        "base.json in .* must hold 'image_names'",
    ),
    "deep JSON": (
        images("images/") | dict.fromkeys(("base.json", "val.json", "novel.json"), "[" * 10**5),
        "base.json in .* is not JSON",
    ),
    "label": (
        images("images/") | json_lists() | {"base.json": json.dumps(
            {"image_names": ["ant/ant0.png"], "image_labels": [5], "label_names": ["ant"]})},
        "Image 0 of base.json in .* has the label 5, but there are 1 names",
    ),
    "no class": (images("data/") | text_lists() | {"splits/bertinetto/val.txt": "cow"}, "but lists 'cow'"),
    "class twice": (images("data/") | text_lists() | {"splits/bertinetto/val.txt": "cat\ncat"}, "but lists 'cat'"),
    "two divisions": (
        images("data/") | text_lists() | text_lists("splits/other/"),
        "has 2 divisions: splits/bertinetto/train.txt, splits/other/train.txt",
    ),
    "two names": (class_folders() | {"valid/cat/0.png": png(0)}, "has val and valid for one split"),
    "tiered": (
        images("") | {"train_images_png.pkl": b"", "train_labels.pkl": b"", "class_names.txt": b""},
        "has train_images_png.pkl, train_labels.pkl, which may divide the classes",
    ),
    "npz": (images("") | {"mini-imagenet-train.npz": b""}, "has mini-imagenet-train.npz, which may divide"),
    "archive": ({"cub.tar.gz": b""}, "holds no data set of images, only cub.tar.gz"),
    "splits": (images("data/") | {"splits/ravi/classes.yaml": b""}, "has splits/ravi/classes.yaml, which may divide"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREAD)
def test_a_division_that_is_not_read_is_named(case, tmp_path):
    files, message = UNREAD[case]
    others = {f"{'data/' if 'data/' in next(iter(files)) else ''}kind{n}/0.png": png(n) for n in range(10)}
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "data", files if case in ("archive", "two names") else files | others), tmp_path, size=8)


@pytest.mark.parametrize("beside", ["splits/bertinetto/train.txt", "base.json"])
def test_a_division_beside_the_folder_of_images_is_named(beside, tmp_path):
    others = {f"kind{n}/0.png": png(n) for n in range(10)}
    images = write(tmp_path / "a/images", others)
    assert len(load(images, tmp_path, size=8).names["train"]) == 6
    write(tmp_path / "a", {beside: ""})
    with pytest.raises(
        DataError, match=f"{beside.split('/')[0]} beside this folder may divide .* Give the folder .*/a"
    ):
        load(images, tmp_path, size=8)
    assert len(load(images, tmp_path, size=8, division="none").names["train"]) == 10


def test_class_folders_with_published_names_are_divided_as_published(tmp_path):
    names = published.counts_of("miniimagenet")
    files = {f"{label}/0.png": png(0) for labels in names.values() for label in labels}
    data = load(write(tmp_path / "data", files), tmp_path, size=8)
    assert {split: set(labels) for split, labels in data.names.items()} == {k: set(v) for k, v in names.items()}
    names = published.counts_of("fc100")
    source = write(tmp_path / "cifar", {f"{label}/0.png": b"" for labels in names.values() for label in labels})
    with pytest.raises(DataError, match="has the classes of cifar-fs and fc100, which divide them differently"):
        load(source, tmp_path, size=8)
    with open_tree(source) as files:
        listing = image_sources.listing(files, "random", "fc100")
    assert {split: set(labels) for split, labels in listing.items()} == {k: set(v) for k, v in names.items()}
