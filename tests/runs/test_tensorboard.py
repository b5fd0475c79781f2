"""What TensorBoard is shown is what `metrics.jsonl` holds, also when a run went on from an earlier step."""

import shutil
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from maml_jax.runs.directory import RunDirectory


def scalars(folder):
    """`{(training, name): [(step, value), ...]}` of all event files: records of a length, data and checksums."""
    found = {}
    for path in sorted(folder.rglob("events.out.tfevents*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4
            for value in event.summary.value:
                key = (str(path.parent.relative_to(folder)), value.tag)
                found.setdefault(key, []).append((event.step, pytest.approx(value.simple_value)))
    return found


def test_numbers_of_each_training(tmp_path):
    run = RunDirectory(tmp_path / "run", "test", {})
    for step in (10, 20):
        run.log(method="maml", seed=3, step=step, loss=1 / step, accuracy=None)
    run.log(method="other", seed=3, step=5, loss=0.5)
    run.log(round=1, ms=3.0)  # Of no training.
    run.close()
    assert scalars(run.path / "events") == {
        ("maml-seed_3", "loss"): [(10, 0.1), (20, 0.05)],
        ("other-seed_3", "loss"): [(5, 0.5)],
    }


def test_a_run_that_goes_on_from_an_earlier_step(tmp_path):
    """Rows of a run that was killed, and whose events never reached the disk; one of them is made again."""
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


def test_text_is_no_path(tmp_path):
    run = RunDirectory(tmp_path / "run", "test", {})
    run.log(data="../../elsewhere", step=1, loss=1.0)
    run.log(data="x" * 300, step=1.0, loss=2.0)
    run.close()
    assert {name for name, _ in scalars(run.path / "events")} == {"_elsewhere", "x" * 100}
    assert {path.name for path in tmp_path.rglob("*") if "elsewhere" in path.name} == {"_elsewhere"}


def test_a_folder_that_cannot_be_written_is_told_once_and_stops_nothing(tmp_path, capsys):
    run = RunDirectory(tmp_path / "run", "test", {})
    (run.path / "events").write_text("a file where the folder should be")
    for step in (1, 2):
        run.log(step=step, loss=1.0)
    run.close()
    assert capsys.readouterr().err.count("TensorBoard shows no more of this run") == 1
    assert [row["step"] for row in run.rows()] == [1, 2]
    (run.path / "events").unlink()
    run = RunDirectory(tmp_path / "run", "test", {})
    run.log(step=3, loss=1.0)
    run.close()
    assert [step for step, _ in scalars(run.path / "events")[".", "loss"]] == [1, 2, 3]
