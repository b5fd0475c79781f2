"""Tests of atomic replacement of files."""

import os
import stat
import threading

import pytest
from helpers.disk import file_size_limit

from maml_jax.atomic import write_atomically


def test_a_reader_sees_the_old_or_the_new_content(tmp_path):
    path = tmp_path / "folder" / "file"
    for content in (b"old", b"new"):
        before = path.read_bytes() if path.exists() else None
        with write_atomically(path) as file:
            file.write(content)
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_content_and_no_temporary_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="File too large"), file_size_limit(100), write_atomically(path) as file:
        file.write(b"x" * 1000)
    with pytest.raises(KeyboardInterrupt), write_atomically(path) as file:
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_permissions_are_kept_and_links_are_not_followed(tmp_path):
    path, target = tmp_path / "file", tmp_path / "target"
    for mode in (0o600, 0o664):
        path.touch()
        path.chmod(mode)
        with write_atomically(path) as file:
            file.write(b"new")
        assert stat.S_IMODE(path.stat().st_mode) == mode
    target.write_bytes(b"kept")
    target.chmod(0o777)
    path.unlink()
    path.symlink_to(target)
    with write_atomically(path) as file:
        file.write(b"new")
    assert target.read_bytes() == b"kept" and path.read_bytes() == b"new" and not path.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) != 0o777


def test_of_two_writers_the_last_wins_whole(tmp_path):
    path, read = tmp_path / "file", set()
    path.write_bytes(b"0" * 10_000)

    def write(digit):
        for _ in range(30):
            with write_atomically(path) as file:
                for _ in range(10):
                    file.write(digit * 1000)

    writers = [threading.Thread(target=write, args=(digit,)) for digit in (b"1", b"2")]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        read.add(path.read_bytes())
    assert read <= {digit * 10_000 for digit in (b"0", b"1", b"2")} and list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))

    def record(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        calls.append("folder" if is_folder else f"file of {os.fstat(descriptor).st_size}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with write_atomically(tmp_path / "file") as file:
        file.write(b"12345")
    assert calls == ["file of 5", "replace", "folder"]
