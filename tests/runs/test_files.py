"""Locks of run directories."""

import subprocess
import sys
from contextlib import closing

import pytest

from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.files import InUseError, Lock

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
            for attempt in (lambda: RunDirectory(tmp_path, "run", {}), lambda: RunDirectory.check(tmp_path, {})):
                with pytest.raises(InUseError, match=rf"{tmp_path} is in use by process {child.pid} on .*--workdir"):
                    attempt()
        finally:
            child.kill()
    Lock(tmp_path).close()


def test_the_error_for_a_lock_of_this_process_says_so(tmp_path):
    with closing(Lock(tmp_path)), pytest.raises(InUseError, match=r"this process: first close\(\) the object"):
        RunDirectory(tmp_path, "run", {})
    Lock(tmp_path).close()
