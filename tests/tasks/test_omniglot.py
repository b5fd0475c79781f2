"""Omniglot is read from real files in each form, and errors name damaged files."""

import json
import os
import shutil
import zipfile

import numpy as np
import pytest
from helpers.pictures import png, write, zipped
from PIL import Image

from maml_jax.tasks import cache, omniglot
from maml_jax.tasks.cache import DataError


@pytest.fixture(scope="module")
def archive(shared_data):
    return shared_data / "omniglot" / "omniglot.zip"


@pytest.fixture(scope="module")
def data(archive, omniglot_cache):
    return omniglot.load(archive, omniglot_cache)


@pytest.fixture(scope="module")
def unpacked(archive, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    return folder


def test_tfds_and_archive_give_the_same_images(data, shared_data, tmp_path):
    read = omniglot.load(shared_data / "tfds", tmp_path)
    assert read.names == data.names
    np.testing.assert_array_equal(read.images, data.images)


def test_folder_and_two_archives_give_the_same_drawings(data, unpacked, tmp_path):
    for part in omniglot.PARTS:
        with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as file:
            for path in sorted((unpacked / part).rglob("*.png")):
                file.write(path, path.relative_to(unpacked))
    for source in (unpacked, tmp_path):
        drawings = omniglot.read_drawings(omniglot.find_source(source))
        assert tuple(drawings) == data.names  # `read_drawings` checks the content hash.


def test_images_are_the_resized_drawings(data):
    assert data.images.shape == (1623, 20, 28, 28) and data.images.dtype == np.uint8
    assert data.images.mean() > 200  # Paper is 255 and most of the image.
    assert len(np.unique(data.images)) > 100  # Smoothed, not black and white.
    assert omniglot.digest(data) == omniglot.IMAGES_SHA256["lanczos"]
    nearest = omniglot.resize_drawings({"a/b/c": np.eye(105, dtype=bool)[None].repeat(20, 0)}, "nearest")
    assert set(np.unique(nearest.images)) <= {0, 255}


def test_splits_are_disjoint_and_have_the_published_classes(data, shared_data):
    for name, sizes in (("paper", (1100, 100, 423)), ("vinyals", (1028, 172, 423))):
        parts = omniglot.split(name, data.names)
        assert tuple(map(len, parts)) == sizes
        assert sorted(np.concatenate(parts)) == list(range(1623))
    for part, indices in omniglot.split("vinyals", data.names)._asdict().items():
        listed = json.loads((shared_data / "splits" / "torchmeta" / "omniglot" / f"{part}.json").read_text())
        expected = {
            f"images_{background}/{alphabet}/{character}"
            for background, alphabets in listed.items()
            for alphabet, characters in alphabets.items()
            for character in characters
        }
        assert {data.names[index] for index in indices} == expected
    with pytest.raises(ValueError, match="split must be one of 'paper', 'vinyals', but got 'mine'"):
        omniglot.split("mine", data.names)


def test_the_cache_is_used_and_rebuilt_when_damaged(data, archive, tmp_path, monkeypatch, capsys):
    arrays = {"images": data.images, "names": np.array(data.names), "sha256": np.array(omniglot.digest(data))}
    path = tmp_path / "omniglot-28-lanczos.npz"
    cache.write(path, arrays)
    assert list(tmp_path.iterdir()) == [path]  # No temporary file is left.
    intact = path.read_bytes()
    reads = []
    monkeypatch.setattr(omniglot, "read_drawings", lambda source: reads.append(source) or {})
    monkeypatch.setattr(omniglot, "resize_drawings", lambda drawings, resampling: data)
    np.testing.assert_array_equal(omniglot.load(archive, tmp_path).images, data.images)
    assert not reads
    flipped = bytearray(intact)
    flipped[len(intact) // 2] ^= 1
    other, made_up = tmp_path / "other.npz", tmp_path / "made_up.npz"
    with np.load(path) as arrays:
        np.savez(other, **{**arrays, "images": arrays["images"] ^ 1})  # An intact file with the wrong content hash.
        images = arrays["images"] ^ 1
    content_hash = omniglot.digest(omniglot.Omniglot(images, data.names))
    cache.write(made_up, {"images": images, "names": np.array(data.names), "sha256": np.array(content_hash)})
    others = (other.read_bytes(), made_up.read_bytes())
    for damage in (intact[: len(intact) // 2], intact[:-1], b"", bytes(flipped), b"not a cache", *others):
        path.write_bytes(damage)
        reads.clear()
        np.testing.assert_array_equal(omniglot.load(archive, tmp_path).images, data.images)
        assert len(reads) == 1 and str(path) in capsys.readouterr().out
        assert path.read_bytes()[:1000] == intact[:1000] and len(path.read_bytes()) == len(intact)


def test_missing_and_empty_directories_suggest_the_download(tmp_path):
    for folder, problem in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "holds no Omniglot")):
        with pytest.raises(DataError, match=problem) as error:
            omniglot.load(folder, tmp_path)
        assert str(folder) in str(error.value) and "--download" in str(error.value)


def test_drawings_are_read_from_small_regular_png_files_only(tmp_path, monkeypatch):
    monkeypatch.setattr(omniglot, "CHARACTERS", 1)
    names = [f"images_background/Greek/character01/{number:02d}.png" for number in range(20)]
    root = write(tmp_path / "data", dict.fromkeys(names, png(0, size=(105, 105))))
    (root / "images_evaluation").mkdir()
    with pytest.raises(DataError, match="not those of Omniglot"):
        omniglot.load(root, tmp_path)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("A program was started."))
    last = root / names[-1]
    for content, message in (
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 105 105\n%%EndComments\n%%EOF\n", "none of the formats PNG"),
        (png(0, size=(106, 105)), "it has 106 x 105 pixels, but at most 11,025"),
        (png(0, size=(105, 104)), r"has shape \(104, 105\)"),
    ):
        last.write_bytes(content)
        with pytest.raises(DataError, match=message) as error:
            omniglot.load(root, tmp_path)
        assert str(last) in str(error.value)
    monkeypatch.setattr("maml_jax.tasks.tree.LARGEST_FILE", 10)
    with pytest.raises(DataError, match="but at most 10 are read"):
        omniglot.load(zipped(tmp_path / "a.zip", dict.fromkeys(names, "x" * 11)), tmp_path)
    last.unlink()
    os.mkfifo(last)
    with pytest.raises(DataError, match=r"Greek/character01 in .* has 19"):
        omniglot.load(root, tmp_path)


def test_errors_name_the_damaged_source(unpacked, archive, shared_data, tmp_path, monkeypatch):
    damaged = tmp_path / "damaged"
    shutil.copytree(unpacked, damaged, copy_function=os.link)
    alphabet = damaged / "images_background" / "Futurama"
    image = sorted((alphabet / "character03").glob("*.png"))[4]
    content = image.read_bytes()
    image.unlink()  # A hard link: the other file stays intact.
    image.write_bytes(content[:40])
    with pytest.raises(DataError, match="damaged") as error:
        omniglot.load(damaged, tmp_path)
    assert str(image) in str(error.value)
    other = sorted((alphabet / "character04").glob("*.png"))[0].read_bytes()
    image.write_bytes(other)
    with pytest.raises(DataError, match="not those of Omniglot"):
        omniglot.load(damaged, tmp_path)
    image.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_, **__: pytest.fail("Missing files are reported before decoding."))
        with pytest.raises(DataError, match=r"Futurama/character03 in .* has 19"):
            omniglot.load(damaged, tmp_path)
        shutil.rmtree(alphabet)
        with pytest.raises(DataError, match="holds 1,597"):
            omniglot.load(damaged, tmp_path)

    cut = tmp_path / "omniglot.zip"
    cut.write_bytes(archive.read_bytes()[:-5000])
    with pytest.raises(DataError, match="damaged or truncated") as error:
        omniglot.load(tmp_path, tmp_path)
    assert str(cut) in str(error.value)

    # A compressed archive of the first characters, damaged in many places.
    deflated = tmp_path / "deflated" / "omniglot.zip"
    deflated.parent.mkdir()
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as target:
        images = sorted(name for name in source.namelist() if name.endswith(".png"))[:600]
        for name in images:
            target.writestr(name, source.read(name))
    monkeypatch.setattr(omniglot, "CHARACTERS", 30)
    intact = deflated.read_bytes()
    for place in range(2000, 200_000, 39_901):
        flipped = bytearray(intact)
        flipped[place] ^= 1 << place % 8
        deflated.write_bytes(flipped)
        with pytest.raises(DataError):
            omniglot.load(deflated, tmp_path)

    prepared = tmp_path / "tfds"
    shutil.copytree(shared_data / "tfds" / "omniglot" / "3.0.0", prepared)
    (record,) = prepared.glob("*-test.array_record*")
    record.write_bytes(record.read_bytes()[:100_000])
    with pytest.raises(DataError, match="TensorFlow Datasets cannot read") as error:
        omniglot.load(prepared, tmp_path)
    assert str(prepared) in str(error.value)
    assert not list(tmp_path.glob("*.npz"))  # No cache was written.
