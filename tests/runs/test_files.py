"""Locks of run directories, and notes."""

import errno
import fcntl
import os
import subprocess
import sys
from contextlib import closing

import pytest

from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.files import InUseError, Lock, folder_name, print_note

HOLD = """
import sys, time
from pathlib import Path
from maml_jax.runs.files import Lock
lock = Lock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def test_a_lock_is_held_until_its_process_ends(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "locked\n"
            holder = f"process {child.pid} on "
            for removed in (False, True):
                for attempt in (lambda: RunDirectory.check(tmp_path, {}), lambda: RunDirectory(tmp_path, "run", {})):
                    with pytest.raises(InUseError, match=rf"{tmp_path} is in use by {holder}.*--workdir"):
                        attempt()
                if not removed:  # The lock outlives its file.
                    (tmp_path / ".lock").unlink()
                    holder = "another process"
        finally:
            child.kill()
    Lock(tmp_path).close()


def test_the_error_for_a_lock_of_this_process_says_so(tmp_path):
    with closing(Lock(tmp_path)), pytest.raises(InUseError, match=r"this process: first close\(\) the object"):
        RunDirectory(tmp_path, "run", {})
    Lock(tmp_path).close()


def test_different_labels_have_different_names_of_folders():
    labels = [
        ("a-b", "c"),
        ("a", "b-c"),
        ("", "a"),
        ("a", ""),
        ("",),
        ("a%2Db", "c"),
        ("a/b",),
        ("..",),
        (".",),
        ("/a",),
    ]
    labels += [("x" * 300,), ("x" * 301,), ("0",), ("é",), ("a b",), ("maml", 0)]
    names = [folder_name(each) for each in labels]
    assert len(set(names)) == len(names)
    for name in names:
        assert "/" not in name and name not in ("", ".", "..") and len(name) <= 255
    assert names[-1] == "maml-0"


def test_a_check_writes_nothing(tmp_path):
    RunDirectory.check(tmp_path, {})
    assert not list(tmp_path.iterdir())
    with closing(RunDirectory(tmp_path, "run", {})):
        pass
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    RunDirectory.check(tmp_path, {})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_file_systems_without_locks_of_directories_lock_the_file(tmp_path, monkeypatch, capsys):
    flock = fcntl.flock

    def as_nfs(descriptor, operation):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)

    def without_locks(descriptor, operation):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    with closing(Lock(tmp_path)), pytest.raises(InUseError, match="is in use by process"):
        Lock(tmp_path)
    assert not capsys.readouterr().err
    monkeypatch.setattr(fcntl, "flock", without_locks)
    Lock(tmp_path).close()
    assert "is on a file system without locks: only one run may use it" in capsys.readouterr().err


@pytest.mark.parametrize("closed", ["closed at the start", "full"])
def test_a_note_that_cannot_be_written_is_left_out(closed, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full if closed == "full" else None)
        print_note("text")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
