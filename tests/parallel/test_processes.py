"""Tests of several processes: they train like one device, and resume after a process is killed or stopped."""

import json
import re
import signal
from contextlib import ExitStack

import numpy as np
import pytest
from helpers.commands import ROOT, free_port, start, wait
from helpers.resumable_run import train_in_both_types

from maml_jax.parallel import processes
from maml_jax.runs.directory import RunDirectory

SCRIPT = ROOT / "tests" / "helpers" / "resumable_run.py"
STEPS = 24
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def start_training(stack, compiled, workdir, count, devices):
    numbers = ("{port}", "{processes}", "{process}")
    return start(stack, compiled, count, devices, SCRIPT, workdir, STEPS, *numbers)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Rows and parameters of the training on one device."""
    run = RunDirectory(tmp_path_factory.mktemp("reference"), "shared", {"steps": STEPS})
    params = train_in_both_types(run, STEPS, mesh=None)
    return run.rows(), params


def assert_same(workdir, reference):
    """The training in `workdir` gave the rows and parameters of the reference, up to rounding."""
    all_rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()], reference[0]
    with np.load(workdir / "params.npz") as arrays:
        for dtype, tolerance in TOLERANCE.items():
            rows, expected_rows = ([row for row in rows if row["dtype"] == dtype] for rows in all_rows)
            assert [row["step"] for row in rows] == [row["step"] for row in expected_rows]
            for name in ("loss", "grad_norm"):
                values = [[row[name] for row in part] for part in (rows, expected_rows)]
                np.testing.assert_allclose(*values, rtol=tolerance)
            for name, expected in reference[1][dtype].items():
                leaf = arrays[f"{name} {dtype}"]
                assert leaf.dtype == dtype
                np.testing.assert_allclose(leaf, expected, rtol=tolerance)


@pytest.mark.parametrize("count, devices", [(1, 4), (4, 1)])
def test_four_devices_in_one_or_four_processes_train_like_one_device(reference, compiled, tmp_path, count, devices):
    with ExitStack() as stack:
        errors, statuses = wait(start_training(stack, compiled, tmp_path, count, devices))
    assert statuses == [0] * count, errors
    assert_same(tmp_path, reference)
    made_by = json.loads((tmp_path / "run.json").read_text())["starts"][0]
    assert made_by["processes"] == count and made_by["hardware"].startswith("4 x")


def test_two_processes_resume_after_a_kill_and_a_stop(reference, compiled, tmp_path):
    reached = 0
    for number in (signal.SIGKILL, signal.SIGTERM):
        with ExitStack() as stack:
            both = start_training(stack, compiled, tmp_path, 2, 1)
            while reached < 8:
                line = both[1].stdout.readline()
                assert line, both[1].stderr.read()
                reached = int(line.split()[1]) if line.startswith("float32") else reached  # Gloo prints other lines.
            both[1].send_signal(number)
            errors, statuses = wait(both)
        if number == signal.SIGKILL:  # The other process does not wait forever.
            assert statuses[1] == -signal.SIGKILL and statuses[0] not in (0, None), errors
            reached = 0
        else:  # Both stop after the same step.
            assert statuses == [128 + signal.SIGTERM] * 2, errors
            saved = re.search(r"Stopped by SIGTERM: step (\d+) is saved", errors[0])[1]
            assert (tmp_path / "checkpoints" / "float32" / saved).is_dir() and "Stopped by" not in errors[1]
            assert "has lost" not in "".join(errors)
    with ExitStack() as stack:
        errors, statuses = wait(start_training(stack, compiled, tmp_path, 2, 1))
    assert statuses == [0, 0], errors
    assert_same(tmp_path, reference)
    assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 3


def test_an_error_of_process_0_ends_all_processes(compiled, tmp_path):
    (tmp_path / "file").touch()
    command = "-m experiments.sinusoid --tasks 4 --workdir".split()
    where = "--coordinator 127.0.0.1:{port} --processes {processes} --process {process}".split()
    with ExitStack() as stack:
        errors, statuses = wait(start(stack, compiled, 2, 1, *command, tmp_path / "file", *where))
    assert statuses == [2, 2]
    assert f"error: {tmp_path / 'file'} is not a directory" in errors[0]
    assert f"error: process 0: {tmp_path / 'file'} is not a directory" in errors[1]


def test_tasks_that_cannot_be_divided_raise_an_error_before_files_are_written(compiled, tmp_path):
    where = "--coordinator 127.0.0.1:{port} --processes {processes} --process {process}".split()
    with ExitStack() as stack:
        errors, statuses = wait(
            start(stack, compiled, 2, 1, "-m", "experiments.sinusoid", "--workdir", tmp_path / "run", *where)
        )
    assert statuses == [2, 2] and all("tasks must be a multiple of 2" in text for text in errors)
    assert not (tmp_path / "run").exists()


def test_processes_with_different_numbers_of_devices_raise_an_error(compiled):
    code = "from maml_jax.parallel import processes; processes.connect('127.0.0.1:{port}', 2, {process})"
    with ExitStack() as stack:
        port = free_port()
        both = [
            start(stack, compiled, 1, devices, "-c", code.format(port=port, process=number))[0]
            for number, devices in enumerate((1, 2))
        ]
        errors, statuses = wait(both)
    assert 0 not in statuses
    assert any("the same number of devices, but got [1, 2]" in text for text in errors)


class TestConnect:
    @pytest.mark.parametrize(
        "given, message",
        [
            ((None, 2, None), "processes 2 needs a coordinator HOST:PORT, but got coordinator None"),
            ((None, None, 0), "process 0 needs a coordinator"),
            (("auto", 2, 0), "processes 2 and process 0 needs a coordinator HOST:PORT, but got coordinator auto"),
            (("here", 2, 0), "coordinator must be HOST:PORT of process 0, or 'auto', but got 'here'"),
            (("here:0", 2, 0), "coordinator must be HOST:PORT"),
            (("here:99999", 2, 0), "coordinator must be HOST:PORT"),
            (("here:1", 2, None), "needs both processes and process"),
            (("here:1", 0, 0), "processes must be an integer of at least 1, but got 0"),
            (("here:1", 2, 2), "process must be from 0 to 1, one less than processes, but got 2"),
            (("here:1", 2, -1), "process must be from 0 to 1"),
        ],
    )
    def test_arguments_are_checked_before_connecting(self, given, message):
        with pytest.raises(ValueError, match=message):
            processes.connect(*given)
