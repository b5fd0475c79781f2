"""Image data sets: splits, resizing, colours and the cache."""

import csv
import hashlib
import io
import json
import os
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.disk import file_size_limit
from helpers.pictures import assert_same, png, small, write, zipped
from PIL import Image

from maml_jax.tasks import cache, host_memory, image_sources, images
from maml_jax.tasks.cache import DataError
from maml_jax.tasks.episodes import EpisodeShape
from maml_jax.tasks.images import load, pictures

OTHERS = tuple(f"kind{number:02d}" for number in range(10))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    return load(write(root / "data", small()), root / "cache", size=8)


def test_caltech_images_are_equal_from_archive_and_folders(shared_data, tmp_path):
    """Reads the archive, and then three images of each class from a folder with CSVs and from class folders."""
    archive = shared_data / "caltech101" / "caltech101_84.zip"
    data = load(archive, tmp_path / "cache")
    described = data.describe()
    sizes = {split: (described[split]["classes"], described[split]["images"]) for split in image_sources.SPLITS}
    assert sizes == {"train": (63, 5521), "val": (16, 948), "test": (20, 1338)}
    assert data.published is None and data.train.images.shape == (5521, 84, 84, 3)
    # The folder of the archive is read as the archive, from the cache.
    assert_same(data, load(archive.parent, tmp_path / "cache"))
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
    assert_same(read, load(write(tmp_path / "folders", folders), tmp_path / "cache"))
    for split in image_sources.SPLITS:
        all_data, part = getattr(data, split), getattr(read, split)
        assert part.counts == (3,) * len(all_data.counts)
        np.testing.assert_array_equal(part.images, all_data.images[(all_data.first[:, None] + np.arange(3)).ravel()])
    first = sorted(name for name, label in some["train"].items() if label == data.names["train"][0])[0]
    with Image.open(io.BytesIO(content[first])) as image:  # 84x84, so it is not resized.
        np.testing.assert_array_equal(data.train.images[0], np.asarray(image.convert("RGB")))


def test_a_folder_of_images_becomes_episodes(tmp_path):
    """Runs the lines of the documentation."""
    folder = write(tmp_path / "birds", {f"{label}/{n}.png": png(n) for label in OTHERS for n in range(16)})
    data = load(folder, tmp_path / "cache", min_images=1 + 15)
    draw, train_data = host_memory.episodes_by_step(
        jax.random.key(0), data.train, 4, EpisodeShape(ways=5, shots=1, queries=15)
    )
    assert data.describe()["train"]["classes"] == 6 and data.describe()["train"]["images"] == 96
    assert jax.eval_shape(draw, train_data, 0).support[0].shape == (4, 5, 84, 84, 3)
    (folder / "kind03" / "7.png").unlink()
    with pytest.raises(DataError, match=r"Class kind03 .* expected at least 16, found 15"):
        load(folder, tmp_path / "cache", min_images=1 + 15)


@pytest.mark.parametrize(
    "option", [{"size": 0}, {"resampling": "best"}, {"division": "mine"}, {"min_images": 0}, {"expect": "imagenet"}]
)
def test_options_are_checked_before_anything_is_read(option, tmp_path):
    with pytest.raises(ValueError, match=next(iter(option))):
        load(tmp_path / "nowhere", tmp_path, **option)


def test_images_are_resized_with_the_given_filter(expected, tmp_path):
    source = write(tmp_path / "data", small())
    with Image.open(source / "images/bee/bee1.png") as image:
        for data, filter in (
            (expected, Image.Resampling.LANCZOS),
            (load(source, tmp_path, size=8, resampling="box"), Image.Resampling.BOX),
        ):
            np.testing.assert_array_equal(data.train.images[4], np.asarray(image.resize((8, 8), filter)))


def test_the_orientation_of_the_camera_is_applied(tmp_path):
    upright = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    exif, files = Image.Exif(), {}
    transverse = np.rot90(upright, 2).swapaxes(0, 1)
    stored = ((6, np.rot90(upright)), (3, upright[::-1, ::-1]), (7, transverse), (9, upright))
    for label, (orientation, pixels) in zip(OTHERS, stored):
        exif[0x0112] = orientation
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", exif=exif)
        files[f"{label}/0.png"] = file.getvalue()
    data = load(write(tmp_path / "data", files), tmp_path, size=8, division="none")
    for image in data.train.images:
        np.testing.assert_array_equal(image, upright)


def test_every_colour_mode_becomes_rgb(tmp_path):
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
    assert np.abs(found["P"].astype(int) - found["RGB"]).mean() < 40  # Colours, not palette indices.
    np.testing.assert_array_equal(found["deep"][..., 0], deep // 256)


class TestCache:
    def test_the_cache_is_used_until_the_source_changes(self, tmp_path, monkeypatch):
        source, folder = write(tmp_path / "data", small()), tmp_path / "cache"
        archive = zipped(tmp_path / "data.zip", small())
        first = load(source, folder, size=8)
        load(archive, folder, size=8)
        with monkeypatch.context() as patch:
            patch.setattr(images, "COMPARED", 0)
            patch.setattr(Image, "open", lambda *_, **__: pytest.fail("The images are in the cache."))
            assert_same(load(source, folder, size=8), first)
            assert_same(load(archive, folder, size=8), first)
            with pytest.raises(DataError, match=r"Class bee of split train .* expected at least 3, found 2"):
                load(source, folder, size=8, min_images=3)
        changed = {**small(), "images/ant/ant0.png": png(1)}
        zipped(archive, changed)
        write(source, changed)
        for data in (load(archive, folder, size=8), load(source, folder, size=8)):
            assert data.sha256["train"] != first.sha256["train"] and data.sha256["val"] == first.sha256["val"]
        (source / "images/ant/ant0.png").unlink()
        with pytest.raises(DataError, match="list 13 files, of which 1 are missing"):
            load(source, folder, size=8)

    def test_a_damaged_cache_is_built_again(self, expected, tmp_path, capsys):
        source, folder = write(tmp_path / "data", small()), tmp_path / "cache"
        load(source, folder, size=8)
        (path,) = folder.iterdir()
        with np.load(path) as stored:
            arrays = dict(stored)
        np.savez(path, **{**arrays, "val": arrays["val"] ^ 1})
        assert_same(load(source, folder, size=8), expected)
        assert f"The cache {path} does not match its checksum" in capsys.readouterr().out
        path.write_bytes(path.read_bytes()[:-100])
        assert_same(load(source, folder, size=8), expected)
        assert f"The cache {path} is damaged" in capsys.readouterr().out

    def test_a_cache_of_other_images_is_built_again(self, expected, tmp_path, capsys):
        """Although its checksum is right."""
        source, folder = write(tmp_path / "data", small()), tmp_path / "cache"
        load(source, folder, size=8)
        (path,) = folder.iterdir()
        intact = path.read_bytes()
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in image_sources.SPLITS}
        for changed in (
            {name: array ^ 1 for name, array in arrays.items()},
            {**arrays, "val": arrays["val"][::-1]},
            {**arrays, "val": arrays["val"][:1]},
            {**arrays, "val": arrays["val"].astype(float)},
        ):
            hashes = []
            for split, array in changed.items():
                names, counts = expected.names[split], getattr(expected, split).counts
                header = json.dumps([names, counts, array.shape]).encode()
                hashes.append(hashlib.sha256(header + array.tobytes()).hexdigest())
            cache.write(path, {**changed, "sha256": np.array(" ".join(hashes))})
            assert_same(load(source, folder, size=8), expected)
            assert f"The cache {path} differs from the images in {source}" in capsys.readouterr().out
            assert path.read_bytes() == intact

    def test_an_image_that_keeps_size_and_time_is_read_again(self, tmp_path):
        source = write(tmp_path / "data", {f"{label}/0.bmp": bmp(9) for label in OTHERS})
        first = load(source, tmp_path, size=8)
        path = source / f"{first.names['train'][2]}/0.bmp"
        times = path.stat()
        path.write_bytes(bmp(200))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert path.stat().st_mtime_ns == times.st_mtime_ns and path.stat().st_size == times.st_size
        assert load(source, tmp_path, size=8).train.images[:, 0, 0, 0].tolist() == [9, 9, 200, 9, 9, 9]

    def test_a_full_disk_leaves_no_part_of_the_cache(self, tmp_path):
        source, folder = write(tmp_path / "data", small()), tmp_path / "cache"
        message = r"The cache .*images-64-lanczos.* cannot be written .* 0 MB"
        with file_size_limit(20_000), pytest.raises(DataError, match=message) as error:
            load(source, folder, size=64)
        assert "--cache-dir" in str(error.value) and list(folder.iterdir()) == []
        load(source, folder, size=64)


def bmp(value):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(file, "BMP")
    return file.getvalue()


def test_drawings_in_the_alpha_channel_differ(tmp_path):
    files = {}
    for number in range(2):
        alpha = np.random.default_rng(number).integers(0, 256, (8, 8, 1), np.uint8)
        file = io.BytesIO()
        Image.fromarray(np.concatenate([np.zeros((8, 8, 3), np.uint8), alpha], -1)).save(file, "PNG")
        files[f"{number}/0.png"] = file.getvalue()
    first, second = load(write(tmp_path / "data", files), tmp_path, size=8, division="none").train.images
    assert (first != second).any() and first.max() > 200 and first.min() < 50


def test_images_without_a_class_are_counted_and_named(tmp_path, capsys):
    files = {name: content for label in OTHERS for name, content in {f"{label}/0.jfif": png(0)}.items()}
    files |= {"kind00/1.HEIC": b"", "kind00/2": b"", "loose.png": png(0), "unlabelled/0.png": png(0)}
    data = load(write(tmp_path / "data", files), tmp_path, size=8)
    assert sorted(sum(data.names.values(), ())) == list(OTHERS)
    note = capsys.readouterr().err
    assert "2 not of a type that is read (kind00/1.HEIC, kind00/2)" in note
    assert "2 in no class (loose.png, unlabelled/0.png)" in note
    load(tmp_path / "data", tmp_path, size=8)
    assert capsys.readouterr().err == note  # Also with images from the cache.


def test_all_pictures_of_a_folder_are_read_by_path(tmp_path):
    folder = write(tmp_path / "data", {"b.png": png(0), "a/c.png": png(1), "notes.txt": "x"})
    found = pictures(folder, size=8)
    assert found.left_out == {}
    assert list(found.images) == ["a/c.png", "b.png"] and found.images["b.png"].shape == (8, 8, 3)


def test_wrong_options_of_pictures_raise(tmp_path):
    for options in ({"size": 0}, {"resampling": "cubic"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            pictures(write(tmp_path / "data", {"b.png": png(0)}), **options)


def test_damaged_pictures_are_left_out_and_named(tmp_path, capsys):
    folder = write(tmp_path / "data", {"b.png": png(0), "a.png": b"broken", "c.HEIC": b""})
    found = pictures(folder, size=8)
    assert list(found.images) == ["b.png"] and found.left_out.keys() == {"a.png", "c.HEIC"}
    note = capsys.readouterr().err
    assert "1 not of a type that is read (c.HEIC); 1 unreadable (a.png)" in note
    assert "The image a.png in" in note and "BytesIO" not in note
