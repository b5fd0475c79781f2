"""What a run shows of itself when asked: a copy for Weights & Biases, and a profile."""

import gzip
import json
import struct
import sys
import time

import jax
import pytest
import wandb
from google.protobuf.message import DecodeError
from helpers.resumable_run import setting
from wandb.proto.wandb_internal_pb2 import Record

from experiments import sinusoid
from experiments.shared import command_line
from maml_jax.runs import wandb_copy
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.files import WorkdirError
from maml_jax.runs.resumable import resumable_train


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def messages(path):
    """Of a file of the package: a header of 7 bytes, then LevelDB's log, records cut at blocks of 32 KiB."""
    content, at, parts = path.read_bytes(), 7, []
    while at < len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # Whole, or the last part.
            yield Record.FromString(b"".join(parts))
            parts = []


def whole(path, seconds=60):
    """All messages; the package's own process writes the last of them after the run has ended."""
    end = time.monotonic() + seconds
    while True:
        try:
            if (found := list(messages(path))) and found[-1].HasField("exit"):
                return found
        except (struct.error, DecodeError):  # Cut, as yet.
            pass
        assert time.monotonic() < end, f"{path} does not end."
        time.sleep(0.2)


def records(folder):
    """What the package has kept of each of its runs: identity, project, and rows."""
    found = []
    for path in sorted(folder.rglob("*.wandb")):
        rows, run = [], None
        for record in whole(path):
            if record.HasField("run"):
                run = record.run
            if record.HasField("history"):
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                rows.append({key: json.loads(value) for key, value in items.items() if not key.startswith("_")})
        found.append((run.run_id, run.project, rows))
    return found


@pytest.mark.filterwarnings("ignore")  # The package leaves files to the garbage collector.
def test_weights_and_biases_gets_a_copy_and_goes_on_with_the_run(tmp_path, offline):
    for step in (10, 20):
        run = RunDirectory(tmp_path, "it", {"rate": 0.1}, wandb="ours")
        run.log(method="maml", seed=3, step=step, loss=1 / step)
        run.close()
    (first, project, rows), (second, _, more) = records(tmp_path)
    assert first == second and project == "ours"
    assert rows == [{"maml/seed 3/loss": 0.1, "maml/seed 3/step": 10}]
    assert more == [{"maml/seed 3/loss": 0.05, "maml/seed 3/step": 20}]
    assert [row["step"] for row in run.rows()] == [10, 20]


def test_where_it_cannot_begin_the_run_says_what_to_do(tmp_path, monkeypatch):
    def init(**_):
        raise wandb.errors.UsageError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(WorkdirError, match=r"cannot begin: api_key not configured.*WANDB_MODE=offline"):
        RunDirectory(tmp_path, "it", {}, wandb="ours")


@pytest.mark.filterwarnings("ignore")
def test_what_goes_wrong_with_the_copy_is_told_and_stops_nothing(tmp_path, offline, monkeypatch, capsys):
    def add(self, row):
        raise RuntimeError("no more of it")

    monkeypatch.setattr(wandb_copy.WandB, "add", add)
    run = RunDirectory(tmp_path, "it", {}, wandb="ours")
    for step in (1, 2):
        run.log(step=step, loss=1.0)
    run.close()
    assert [row["step"] for row in run.rows()] == [1, 2]
    assert (
        capsys.readouterr().err.count("Weights & Biases gets no more of this run: RuntimeError('no more of it')") == 1
    )


@pytest.mark.filterwarnings("ignore")
def test_what_goes_wrong_at_its_end_loses_no_results(tmp_path, offline, monkeypatch, capsys):
    closed, close = [], wandb_copy.WandB.close

    def broken(self):
        closed.append(close(self))
        raise BrokenPipeError("gone")

    monkeypatch.setattr(wandb_copy.WandB, "close", broken)
    run = RunDirectory(tmp_path, "it", {}, wandb="ours")
    run.log(step=1, loss=1.0)
    assert run.write_results({"loss": 1.0}).exists()
    run.close()
    assert len(closed) == 1 and "may lack the end of this run: BrokenPipeError('gone')" in capsys.readouterr().err
    RunDirectory(tmp_path, "it", {}).close()


def test_without_the_package_it_is_refused_at_once(monkeypatch, capsys):
    monkeypatch.setattr(wandb_copy.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["sinusoid", "--wandb", "ours"])
    monkeypatch.setattr(command_line.jax.config, "update", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        command_line.run(sinusoid.Config, sinusoid.prepare, sinusoid.main)
    assert end.value.code == 2 and "wandb ours needs the package wandb: pip install wandb" in capsys.readouterr().err


def test_a_profile_of_two_calls(tmp_path, capsys):
    learner, state, draw = setting()
    run = RunDirectory(tmp_path, "tiny", {})
    steps = [
        row["step"]
        for _, row in resumable_train(
            learner, state, draw, jax.random.key(1), steps=10, steps_per_call=2, run=run, save_every=10, profile=True
        )
    ]
    assert steps == [2, 4, 6, 8, 10]
    (trace,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert f"A profile of 2 calls is in {tmp_path / 'profile'}" in capsys.readouterr().err
    assert 0 < names.count("PjitFunction(run)") <= 4  # Each call is told twice.
