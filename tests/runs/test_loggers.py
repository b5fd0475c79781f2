"""Loggers copy all rows of `metrics.jsonl`, also when a run resumes, and their errors do not stop a run."""

import json
import shutil
import struct
import sys
import time

import pytest
import wandb
from google.protobuf.message import DecodeError
from tensorboardX.proto.event_pb2 import Event
from wandb.proto.wandb_internal_pb2 import Record

from experiments import sinusoid
from experiments.shared import command_line
from maml_jax.runs import loggers
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.files import WorkdirError


def scalars(folder):
    """Reads all event files: `{(training, name): [(step, value), ...]}`."""
    found = {}
    for path in sorted(folder.rglob("events.out.tfevents*")):
        content, offset = path.read_bytes(), 0
        while offset < len(content):  # Length, checksum of the length, message, checksum of the message.
            (length,) = struct.unpack_from("<Q", content, offset)
            event = Event.FromString(content[offset + 12 : offset + 12 + length])
            offset += 12 + length + 4
            for value in event.summary.value:
                key = (str(path.parent.relative_to(folder)), value.tag)
                found.setdefault(key, []).append((event.step, pytest.approx(value.simple_value)))
    return found


def test_tensorboard_gets_the_numbers_of_each_training(tmp_path):
    run = RunDirectory(tmp_path / "run", "test", {})
    for step in (10, 20):
        run.log(method="maml", seed=3, step=step, loss=1 / step, accuracy=None)
    run.log(method="other", seed=3, step=5, loss=0.5)
    run.log(round=1, ms=3.0)  # Without a step.
    run.close()
    assert scalars(run.path / "events") == {
        ("maml-seed 3", "loss"): [(10, 0.1), (20, 0.05)],
        ("other-seed 3", "loss"): [(5, 0.5)],
    }


def test_tensorboard_starts_again_when_a_run_resumes_from_an_earlier_step(tmp_path):
    """The events of the killed run were not written, and the row of step 3 is logged again."""
    run = RunDirectory(tmp_path / "run", "test", {})
    for step in (1, 2, 3):
        run.log(step=step, loss=float(step))
    run.close()
    shutil.rmtree(run.path / "events")
    run = RunDirectory(tmp_path / "run", "test", {})
    run.drop_rows_after(2)
    for step in (3, 4):
        run.log(step=step, loss=10.0 * step)
    run.close()
    assert scalars(run.path / "events") == {(".", "loss"): [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]}


def test_a_label_cannot_name_a_folder_outside_of_the_events(tmp_path):
    run = RunDirectory(tmp_path / "run", "test", {})
    run.log(data="../../elsewhere", step=1, loss=1.0)
    run.log(data="x" * 300, step=1.0, loss=2.0)
    run.log(data="x" * 301, step=1.0, loss=2.0)
    run.close()
    names = sorted({name for name, _ in scalars(run.path / "events")})
    assert names[0] == "%2E.%2F..%2Felsewhere" and [name[:181] for name in names[1:]] == ["x" * 180 + "%"] * 2
    assert {path.name for path in tmp_path.rglob("*") if "elsewhere" in path.name} == {names[0]}


def test_an_error_of_tensorboard_is_reported_once_and_the_run_continues(tmp_path, capsys):
    run = RunDirectory(tmp_path / "run", "test", {})
    (run.path / "events").write_text("a file where the folder should be")
    for step in (1, 2):
        run.log(step=step, loss=1.0)
    run.close()
    assert capsys.readouterr().err.count("TensorBoard gets no more rows of this run") == 1
    assert [row["step"] for row in run.rows()] == [1, 2]
    (run.path / "events").unlink()
    run = RunDirectory(tmp_path / "run", "test", {})
    run.log(step=3, loss=1.0)
    run.close()
    assert [step for step, _ in scalars(run.path / "events")[".", "loss"]] == [1, 2, 3]


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def messages(path):
    """Reads a file of wandb: a header of 7 bytes, then the log format of LevelDB, in blocks of 32 KiB."""
    content, offset, parts = path.read_bytes(), 7, []
    while offset < len(content):
        if (rest := 32768 - offset % 32768) < 7:
            offset += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", content, offset)
        parts.append(content[offset + 7 : offset + 7 + length])
        offset += 7 + length
        if kind in (1, 4):  # A complete record, or its last part.
            yield Record.FromString(b"".join(parts))
            parts = []


def all_messages(path, seconds=60):
    """Waits for the last message, which a process of wandb writes after the run has ended."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if (found := list(messages(path))) and found[-1].HasField("exit"):
                return found
        except (struct.error, DecodeError):  # The last record is incomplete.
            pass
        assert time.monotonic() < deadline, f"{path} has no end."
        time.sleep(0.2)


def records(folder):
    """Returns the id, project and rows of each run of wandb."""
    found = []
    for path in sorted(folder.rglob("*.wandb")):
        rows, run = [], None
        for record in all_messages(path):
            if record.HasField("run"):
                run = record.run
            if record.HasField("history"):
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                rows.append({key: json.loads(value) for key, value in items.items() if not key.startswith("_")})
        found.append((run.run_id, run.project, rows))
    return found


@pytest.mark.filterwarnings("ignore")  # wandb leaves open files to the garbage collector.
def test_weights_and_biases_gets_a_copy_and_resumes_with_the_run(tmp_path, offline):
    for step in (10, 20):
        run = RunDirectory(tmp_path, "run", {"rate": 0.1}, wandb="ours")
        run.log(method="maml", seed=3, step=step, loss=1 / step)
        run.close()
    (first, project, rows), (second, _, more) = records(tmp_path)
    assert first == second and project == "ours"
    assert rows == [{"maml/seed 3/loss": 0.1, "maml/seed 3/step": 10}]
    assert more == [{"maml/seed 3/loss": 0.05, "maml/seed 3/step": 20}]
    assert [row["step"] for row in run.rows()] == [10, 20]


def test_an_error_of_wandb_at_the_start_says_what_to_do(tmp_path, monkeypatch):
    def init(**_):
        raise wandb.errors.UsageError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(WorkdirError, match=r"cannot start: api_key not configured.*WANDB_MODE=offline"):
        RunDirectory(tmp_path, "run", {}, wandb="ours")


@pytest.mark.filterwarnings("ignore")
def test_an_error_of_wandb_while_logging_is_reported_and_the_run_continues(tmp_path, offline, monkeypatch, capsys):
    def log(self, row):
        raise RuntimeError("lost")

    monkeypatch.setattr(loggers.WandBLogger, "log", log)
    run = RunDirectory(tmp_path, "run", {}, wandb="ours")
    for step in (1, 2):
        run.log(step=step, loss=1.0)
    run.close()
    assert [row["step"] for row in run.rows()] == [1, 2]
    note = "Weights & Biases gets no more rows of this run: RuntimeError('lost')"
    assert capsys.readouterr().err.count(note) == 1


@pytest.mark.filterwarnings("ignore")
def test_an_error_of_wandb_at_the_end_loses_no_results(tmp_path, offline, monkeypatch, capsys):
    closed, close = [], loggers.WandBLogger.close

    def failing(self):
        closed.append(close(self))
        raise BrokenPipeError("gone")

    monkeypatch.setattr(loggers.WandBLogger, "close", failing)
    run = RunDirectory(tmp_path, "run", {}, wandb="ours")
    run.log(step=1, loss=1.0)
    assert run.write_results({"loss": 1.0}).exists()
    run.close()
    assert (
        len(closed) == 1
        and "Weights & Biases gets no more rows of this run: BrokenPipeError('gone')" in capsys.readouterr().err
    )
    RunDirectory(tmp_path, "run", {}).close()


def test_the_missing_package_wandb_is_reported_before_the_run(monkeypatch, capsys):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["sinusoid", "--wandb", "ours"])
    monkeypatch.setattr(command_line.jax.config, "update", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        command_line.run(sinusoid.Config, sinusoid.prepare, sinusoid.main)
    assert end.value.code == 2 and "wandb ours needs the package wandb: pip install wandb" in capsys.readouterr().err
