"""Omniglot, read from real files in each of its forms, whole and damaged."""

import hashlib
import http.server
import json
import os
import shutil
import threading
import zipfile

import numpy as np
import pytest

from maml_jax.tasks import download, omniglot
from maml_jax.tasks.cache import write
from maml_jax.tasks.omniglot import DataError


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


def test_tfds_and_archive_give_the_same_cache(data, shared_data, tmp_path):
    read = omniglot.load(shared_data / "tfds", tmp_path)
    assert read.names == data.names
    np.testing.assert_array_equal(read.images, data.images)


def test_folder_and_two_archives_are_read_like_one_archive(data, unpacked, tmp_path):
    for part in omniglot.PARTS:
        with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as file:
            for path in sorted((unpacked / part).rglob("*.png")):
                file.write(path, path.relative_to(unpacked))
    for source in (unpacked, tmp_path):
        drawings = omniglot.read_drawings(omniglot.find_source(source))
        assert tuple(drawings) == data.names  # And their content hash was checked on the way.


def test_images_are_the_drawings(data):
    assert data.images.shape == (1623, 20, 28, 28) and data.images.dtype == np.uint8
    assert data.images.mean() > 200  # Paper is 255 and most of the sheet.
    assert len(np.unique(data.images)) > 100  # Smoothed, not the nearest of black and white.
    nearest = omniglot._resized({"a/b/c": np.eye(105, dtype=bool)[None].repeat(20, 0)}, "nearest")
    assert set(np.unique(nearest.images)) <= {0, 255}


def test_splits(data, shared_data):
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
    write(tmp_path / "omniglot-28-lanczos.npz", arrays)
    (cache,) = tmp_path.iterdir()  # No part of a write is left beside it.
    whole = cache.read_bytes()
    reads = []
    monkeypatch.setattr(omniglot, "read_drawings", lambda source: reads.append(source) or {})
    monkeypatch.setattr(omniglot, "_resized", lambda drawings, resampling: data)
    np.testing.assert_array_equal(omniglot.load(archive, tmp_path).images, data.images)
    assert not reads
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    other = tmp_path / "other.npz"  # Whole as a file, but not what its content hash says.
    with np.load(cache) as arrays:
        np.savez(other, **{**arrays, "images": arrays["images"] ^ 1})
    for damage in (whole[: len(whole) // 2], whole[:-1], b"", bytes(flipped), b"no cache at all", other.read_bytes()):
        cache.write_bytes(damage)
        reads.clear()
        np.testing.assert_array_equal(omniglot.load(archive, tmp_path).images, data.images)
        assert len(reads) == 1 and str(cache) in capsys.readouterr().out
        assert cache.read_bytes()[:1000] == whole[:1000] and len(cache.read_bytes()) == len(whole)


def test_missing_and_empty_directories_name_the_way_out(tmp_path):
    for folder, what in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "holds no Omniglot")):
        with pytest.raises(DataError, match=what) as error:
            omniglot.load(folder, tmp_path)
        assert str(folder) in str(error.value) and "--download" in str(error.value)


def test_damaged_sources_are_named(unpacked, archive, shared_data, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    shutil.copytree(unpacked, broken, copy_function=os.link)
    alphabet = broken / "images_background" / "Futurama"
    image = sorted((alphabet / "character03").glob("*.png"))[4]
    kept = image.read_bytes()
    image.unlink()  # A link: what it points to stays whole.
    image.write_bytes(kept[:40])
    with pytest.raises(DataError, match="damaged") as error:
        omniglot.load(broken, tmp_path)
    assert str(image) in str(error.value)
    other = sorted((alphabet / "character04").glob("*.png"))[0].read_bytes()
    image.write_bytes(other)
    with pytest.raises(DataError, match="not those of Omniglot"):
        omniglot.load(broken, tmp_path)
    image.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(
            omniglot, "_decode", lambda *_: pytest.fail("What is missing is told before anything is decoded.")
        )
        with pytest.raises(DataError, match=r"Futurama/character03 in .* has 19"):
            omniglot.load(broken, tmp_path)
        shutil.rmtree(alphabet)
        with pytest.raises(DataError, match="holds 1,597"):
            omniglot.load(broken, tmp_path)

    cut = tmp_path / "omniglot.zip"
    cut.write_bytes(archive.read_bytes()[:-5000])
    with pytest.raises(DataError, match="damaged or cut short") as error:
        omniglot.load(tmp_path, tmp_path)
    assert str(cut) in str(error.value)

    # A compressed part of the archive, long enough to damage in many places, without the count of its characters.
    monkeypatch.setattr(omniglot, "_check_complete", lambda *_: None)
    deflated = tmp_path / "deflated" / "omniglot.zip"
    deflated.parent.mkdir()
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.namelist()[:600]:
            target.writestr(member, source.read(member))
    whole = deflated.read_bytes()
    for place in range(2000, 200_000, 39_901):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        deflated.write_bytes(damaged)
        with pytest.raises(DataError):
            omniglot.load(deflated, tmp_path)

    prepared = tmp_path / "tfds"
    shutil.copytree(shared_data / "tfds" / "omniglot" / "3.0.0", prepared)
    (record,) = prepared.glob("*-test.array_record*")
    record.write_bytes(record.read_bytes()[:100_000])
    with pytest.raises(DataError, match="TensorFlow Datasets cannot read") as error:
        omniglot.load(prepared, tmp_path)
    assert str(prepared) in str(error.value)
    assert not list(tmp_path.glob("*.npz"))  # Nothing of this became a cache.


class TestDownload:
    """Against a real server on loopback."""

    CONTENT = bytes(range(256)) * 4000

    @pytest.fixture
    def address(self):
        content, served = self.CONTENT, []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                served.append(self.path)
                body = {"/whole.zip": content, "/cut.zip": content[:-1], "/long.zip": content * 2}.get(self.path)
                body = b"\1" + content[1:] if self.path == "/changed.zip" else body
                self.send_response(404 if body is None else 200)
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *args):
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            yield f"http://127.0.0.1:{server.server_port}", served
            server.shutdown()
            thread.join()

    def archive(self, url):
        return download.Archive(url, len(self.CONTENT), hashlib.sha256(self.CONTENT).hexdigest())

    def test_fetches_once(self, address, tmp_path):
        url, served = address
        target = tmp_path / "new" / "whole.zip"
        for _ in range(2):
            download.fetch(self.archive(f"{url}/whole.zip"), target)
        assert target.read_bytes() == self.CONTENT and served == ["/whole.zip"]
        target.write_bytes(self.CONTENT[:100])
        download.fetch(self.archive(f"{url}/whole.zip"), target)
        assert target.read_bytes() == self.CONTENT

    @pytest.mark.parametrize("name", ["cut", "long", "changed", "missing"])
    def test_what_is_wrong_is_refused_and_leaves_nothing(self, address, tmp_path, name):
        url, _ = address
        with pytest.raises(DataError, match=f"{url}/{name}.zip"):
            download.fetch(self.archive(f"{url}/{name}.zip"), tmp_path / "it.zip")
        assert not list(tmp_path.iterdir())

    def test_a_folder_that_cannot_be_is_told(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(DataError, match=r"Cannot write .*file/it.zip: .*or another folder"):
            download.fetch(self.archive("http://127.0.0.1:1/it.zip"), tmp_path / "file" / "it.zip")

    def test_the_official_archives_are_known(self):
        assert [archive.size for archive in download.OMNIGLOT] == [9_464_212, 6_462_886]
        assert all(len(archive.sha256) == 64 for archive in download.OMNIGLOT)
