"""Folders and archives are listed: regular files, each folder once, with readable names; the rest is counted."""

import os
import unicodedata
import zipfile

import pytest
from helpers.pictures import png, write, zipped

from maml_jax.tasks import tree
from maml_jax.tasks.cache import DataError
from maml_jax.tasks.tree import open_tree, readable


def listed(source):
    with open_tree(source) as files:
        return files


def test_pipes_devices_and_links_without_end_are_left_out(tmp_path):
    root = write(tmp_path / "data", {"a/0.png": b"1", "b/0.png": b"22"})
    os.mkfifo(root / "a/pipe.png")
    links = {
        "a/zero.png": "/dev/zero",
        "a/nowhere.png": "nowhere",
        "a/itself": "itself",
        **dict.fromkeys(("a/x", "a/y"), "../b"),
        **dict.fromkeys(("b/x", "b/y"), "../a"),
        "b/up": "../..",
        "0": "b",  # Comes before b, but is a link.
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    found = listed(root)
    assert found.sizes == {"a/0.png": 1, "b/0.png": 2} and set(found.folders) == {".", "a", "b"}
    assert found.left_out.keys() == links.keys() | {"a/pipe.png"}
    assert found.left_out["a/pipe.png"] == found.left_out["a/zero.png"] == "no regular file"
    # A folder that only a link reaches is read, as are links to files.
    write(tmp_path / "elsewhere", {"1.png": b"333"})
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "b/2.png").symlink_to(tmp_path / "elsewhere/1.png")
    assert listed(root).sizes == {"a/0.png": 1, "b/0.png": 2, "b/2.png": 3, "c/1.png": 3}


def test_a_data_directory_that_is_no_file_raises(tmp_path):
    os.mkfifo(tmp_path / "pipe.zip")
    assert listed(tmp_path).left_out == {"pipe.zip": "no regular file"}
    with pytest.raises(DataError, match=r"pipe.zip must be a folder or a zip archive, but is neither"):
        listed(tmp_path / "pipe.zip")
    (tmp_path / "data.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=r"data.tar.gz cannot be read: .* Unpack an archive of another kind"):
        listed(tmp_path / "data.tar.gz")


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_other_files_are_counted_and_named(form, tmp_path, capsys):
    files = {f"a/{number}.HEIC": "x" for number in range(7)}
    files |= {"a/0.jfif": "x", "a/1.JPE": "x", "a/2.avif": "x", "a/3.tga": "x", "a/4": "x", "a/.5.png": "x"}
    files |= {".DS_Store": "x", "a/._0.jfif": "x", "__MACOSX/a/._0.jfif": "x"}
    found = listed(write(tmp_path / "a", files) if form == "folder" else zipped(tmp_path / "a.zip", files))
    assert found.images() == ["a/0.jfif", "a/1.JPE", "a/2.avif", "a/3.tga"]
    tree.report(found.where, found.left_out)
    note = capsys.readouterr().err
    assert f"left out of {tmp_path / 'a'}" in note and "1 hidden (a/.5.png)" in note
    assert "8 not of a type that is read (a/0.HEIC, a/1.HEIC" in note and "and 3 more)" in note
    tree.report(found.where, {})
    assert capsys.readouterr().err == ""


def test_names_are_in_one_unicode_form_and_can_be_printed(tmp_path):
    name = "caf\u00e9.png"
    root = write(tmp_path / "data", {unicodedata.normalize("NFD", name): b"1"})
    with open(os.fsencode(root) + b"/\xe9.png", "wb") as file:
        file.write(b"22")
    with open_tree(root) as found:
        assert found.sizes == {name: 1, "\\udce9.png": 2}
        assert found.read(name) == b"1" and found.read("\\udce9.png") == b"22"
    (root / name).write_bytes(b"3")
    with pytest.raises(DataError, match=r"holds café.png more than once, perhaps in two Unicode forms"):
        listed(root)
    assert readable("\ud800") == "\\ud800"


def test_names_in_archives_have_slashes_and_the_encoding_of_their_system(tmp_path):
    path = zipped(tmp_path / "a.zip", {"b\\c\\0.png": b"1", "./d/1.png": b"2", "/etc/2.png": b"3", "../3.png": b"4"})
    assert [*listed(path).sizes] == ["b/c/0.png", "d/1.png", "etc/2.png"]
    assert set(listed(path).folders) == {".", "b", "b/c", "d", "etc"}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cafXX.png", b"5")
    # macOS writes UTF-8 without the flag for UTF-8.
    path.write_bytes(path.read_bytes().replace(b"cafXX", "caf\u00e9".encode()))
    with open_tree(path) as found:
        assert found.read("caf\u00e9.png") == b"5"


def test_errors_of_the_block_do_not_blame_the_archive(tmp_path):
    for error in (RuntimeError("mine"), EOFError("mine"), NotImplementedError("mine")):
        with pytest.raises(type(error), match="mine"), open_tree(zipped(tmp_path / "a.zip", {"0.png": png(0)})):
            raise error


def test_the_hash_changes_with_the_content_of_a_file(tmp_path):
    """Although size and modification time stay."""
    path = write(tmp_path, {"a.png": b"1"}) / "a.png"
    before, status = listed(tmp_path).sha256(), path.stat()
    assert listed(tmp_path).sha256() == before
    path.write_bytes(b"2")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert listed(tmp_path).sha256() != before


def test_large_and_growing_files_raise(tmp_path, monkeypatch):
    write(tmp_path, {"a.png": b"12345", "b.png": b"1"})
    with open_tree(tmp_path) as found:
        (tmp_path / "b.png").write_bytes(b"123")
        with pytest.raises(DataError, match=r"b.png in .* changed while the data set was read"):
            found.read("b.png")
        (tmp_path / "b.png").unlink()
        with pytest.raises(DataError, match=r"b.png in .* cannot be read: No such file"):
            found.read("b.png")
        monkeypatch.setattr(tree, "LARGEST_FILE", 4)
        with pytest.raises(DataError, match=r"a.png in .* has 5 bytes, but at most 4 are read"):
            found.read("a.png")
