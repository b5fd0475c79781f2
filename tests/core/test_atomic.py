"""Tests of atomic replacement of files."""

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
