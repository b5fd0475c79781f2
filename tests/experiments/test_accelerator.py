"""The script for accelerators, on a CPU."""

import json
import threading
import time
from pathlib import Path

import pytest

from experiments import accelerator


def test_jobs_are_measured_one_after_the_other_and_failures_are_reported(tmp_path, monkeypatch, capsys):
    small = {"workload": "sinusoid", "devices": 1}
    given = [
        {"job": "measure", "seconds": 0.1, "precision": "tensorfloat32", **small},
        {"job": "error", "dtype": "bfloat16", **small},
        {"job": "measure", "seconds": 0.1, "workload": "no such workload"},
    ]
    monkeypatch.setattr(accelerator, "jobs", lambda seconds, torch: given)
    config = accelerator.Config(stages=("measure",), workdir=tmp_path / "run")
    rows = accelerator.main(accelerator.prepare(config))["rows"]
    assert rows == json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    measured, error, failed = rows
    assert min(measured["ms"]) > 0 and measured["gflop"] > 0 and measured["precision"] == "tensorfloat32"
    assert 1e-4 < error["gradient_error"] < 0.1
    assert failed["error"] == "not compiled: KeyError: 'no such workload'"
    printed = capsys.readouterr().out
    assert "1/3  measure sinusoid tensorfloat32" in printed and "2/3  error sinusoid bfloat16: relative" in printed


def test_a_training_is_stopped_at_the_time_limit_and_saves(tmp_path, monkeypatch):
    command = tmp_path / "python"
    command.write_text(
        "#!/bin/bash\ncd ${0%/*}; trap 'echo saved >> log; exit 143' TERM; echo $@ > log; sleep 5 & wait\n"
    )
    command.chmod(0o755)
    monkeypatch.setattr(accelerator.sys, "executable", str(command))
    config = accelerator.Config(("train",), train_seconds=0.5, data_dir=tmp_path, train_workdir=tmp_path / "run")
    assert accelerator.main(accelerator.prepare(config)) == {}  # The limit is no failure.
    given, end = (tmp_path / "log").read_text().splitlines()
    assert given.startswith("-m experiments.omniglot --ways 20 --shots 1") and end == "saved"
    command.write_text("#!/bin/bash\nexit 2\n")
    with pytest.raises(SystemExit, match="2"):
        accelerator.main(config)


def test_late_jobs_are_not_measured(tmp_path):
    job = accelerator.Job({"job": "measure"}, tmp_path / "log", "cpu")
    job.compile(end=0.0)
    assert job.result(1.0) == {"error": "not compiled: the time was up"}


@pytest.mark.parametrize(
    "script, message",
    [
        ("echo a warning >&2; exec sleep 60", "not compiled: the time was up"),
        ("exit 3", "not compiled: ended with status 3"),
        ("echo ready; kill -9 $$", "ended with status -9"),
    ],
)
def test_jobs_that_are_stopped_or_end_without_a_message(script, message, tmp_path):
    job = accelerator.Job({"job": "measure"}, tmp_path / "log", "cpu")
    job.command = ["bash", "-c", script]
    stop = threading.Timer(0.3, job.stop)
    stop.start()
    job.compile(end=time.monotonic() + 60)
    assert job.result(1.0) == {"error": message}
    stop.cancel()


def test_jobs_cover_every_workload_precision_and_peer():
    found = accelerator.jobs(0.5, torch=True)
    assert {job["workload"] for job in found if job.get("job") == "measure"} == set(accelerator.WORKLOADS)
    assert {job["peer"] for job in found if "peer" in job} == set(accelerator.PEERS)
    errors = [job for job in found if job.get("job") == "error"]
    assert [{**job} | options for job, options in zip(errors, accelerator.PRECISIONS.values())] == errors
    assert not any("peer" in job for job in accelerator.jobs(0.5, torch=False))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stages": ()}, "at least one"),
        ({"seconds": 0.0}, "seconds"),
        ({"data_dir": Path("nowhere")}, "nowhere does not exist, but the training needs Omniglot"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        accelerator.prepare(accelerator.Config(**options))
