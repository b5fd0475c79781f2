"""The published class lists, and the comparison of data sets with them."""

import csv
import json

import pytest
from helpers.pictures import CLASSES, class_folders, write

from maml_jax.tasks import image_sources, published
from maml_jax.tasks.cache import DataError
from maml_jax.tasks.images import load


def test_the_lists_are_the_published_lists(shared_data):
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
        assert published.identify(published.counts_of(name)) == name


def test_the_error_lists_the_differences():
    counts = published.counts_of("miniimagenet")
    published.check("miniimagenet", counts, "here")
    assert published.identify(counts) == "miniimagenet"
    counts["train"]["n01532829"] = 599
    del counts["test"]["n01930112"]
    counts["val"]["mine"] = 31
    assert published.identify(counts) is None
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


def test_load_compares_a_data_set_with_its_list(tmp_path, monkeypatch):
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
