"""The processes that run rows of the table: finished and failed runs, the time budget, and signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.made_up_runs import ROOT, made_up, start

from experiments import miniimagenet, reproduce

STUB = """
import json, pathlib, signal, sys, time
workdir, behaviour, results = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
workdir.mkdir(exist_ok=True)
(workdir / "metrics.jsonl").write_text('{"step": 40}\\n')
if len(sys.argv) > 4:
    (workdir / "run.json").write_text(json.dumps({"config": {"row": sys.argv[4], "seed": 0}}))
with open(workdir.parent / "order", "a") as file:
    file.write(workdir.name + "\\n")
def stop(*_):
    (workdir / "saved").touch()
    sys.exit(143)
if behaviour == "fails":
    sys.exit("one\\nerror: the loss is nan")
if behaviour.startswith("error: "):
    print(behaviour, file=sys.stderr)
    sys.exit(2)
if behaviour in ("hangs", "stubborn"):
    signal.signal(signal.SIGTERM, stop if behaviour == "hangs" else signal.SIG_IGN)
    (workdir / "ready").touch()
    time.sleep(60)
(workdir / "results.json").write_text(pathlib.Path(results).read_text())
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Runs a small program in place of the experiments. Returns a function that sets the behaviour of each row."""
    program, behaviours = tmp_path / "stub.py", {}
    program.write_text(STUB)

    def command(config, row, seed):
        name = f"{row.name}-seed{seed}"
        if not (tmp_path / "made" / name).exists():
            made_up(tmp_path / "made" / name, row.name, seed, config.steps or row.steps, inductive=0.8)
        results = tmp_path / "made" / name / "results.json"
        return [
            sys.executable,
            str(program),
            str(config.workdir / name),
            behaviours.get(row.name, "ends"),
            str(results),
            row.name,
        ]

    monkeypatch.setattr(reproduce, "command", command)
    return behaviours.update


def test_other_rows_run_after_a_failure_and_finished_rows_are_skipped(stub, tmp_path, capfd):
    chosen = ("omniglot-5w1s", "omniglot-5w1s-order1")
    stub({"omniglot-5w1s": "fails"})
    with pytest.raises(SystemExit) as end:
        start(tmp_path, rows=chosen, steps=100, seeds=(0, 1))
    assert end.value.code == 1
    output = capfd.readouterr().out
    assert "omniglot-5w1s-seed1: failed with status 1:\n  one\n  error: the loss is nan\n" in output
    assert "omniglot-5w1s-order1-seed1: finished\n" in output
    order = tmp_path / "work" / "order"
    expected = [
        "omniglot-5w1s-seed0",
        "omniglot-5w1s-order1-seed0",
        "omniglot-5w1s-seed1",
        "omniglot-5w1s-order1-seed1",
    ]
    assert order.read_text().split() == expected
    text = (tmp_path / "work" / "index.html").read_text()
    assert "100 of 60,000 meta-steps" in text and "in training, 40 of 60,000" in text

    order.unlink()
    stub({"omniglot-5w1s": "ends"})
    start(tmp_path, rows=chosen, steps=100, seeds=(0, 1))
    assert order.read_text().split() == ["omniglot-5w1s-seed0", "omniglot-5w1s-seed1"]
    assert "omniglot-5w1s-order1-seed0: finished before" in capfd.readouterr().out
    order.unlink()
    start(tmp_path, rows=chosen[:1], steps=200)  # A longer schedule is not finished yet.
    assert order.read_text().split() == ["omniglot-5w1s-seed0"]


def test_data_that_a_run_refuses_are_not_tried_again(stub, tmp_path, capfd):
    rows = ("omniglot-5w1s", "omniglot-5w1s-order1", "omniglot-5w1s-anil")
    stub({rows[0]: "error: a wrong option", rows[1]: f"error: the folder {tmp_path} is empty"})
    with pytest.raises(SystemExit):
        start(tmp_path, rows=rows, steps=100)
    assert (tmp_path / "work" / "order").read_text().split() == ["omniglot-5w1s-seed0", "omniglot-5w1s-order1-seed0"]
    output = capfd.readouterr().out
    assert f"omniglot-5w1s-anil-seed0: not run: omniglot-5w1s-order1-seed0 could not use {tmp_path}\n" in output


def test_a_row_of_own_images_is_finished_only_for_the_same_folder(tmp_path):
    made_up(tmp_path / "images-5w1s-seed0", "images-5w1s", steps=100)
    places = {"rows": ("images-5w1s",), "steps": 100, "workdir": tmp_path}
    same = miniimagenet.Run().data_dir
    for images, evaluation, finished in (
        (same, "transductive", True),
        (tmp_path, "transductive", False),
        (same, "both", False),  # The inductive evaluation is missing.
    ):
        _, (job,) = reproduce.prepare(reproduce.Config(image_dir=images, evaluation=evaluation, list=True, **places))
        assert job.finished == finished
        assert ("--evaluation transductive" in str(job)) == (evaluation == "transductive")


def test_at_the_end_of_the_budget_the_run_saves_and_no_other_run_starts(stub, tmp_path, capfd):
    stub({"omniglot-5w1s-order1": "hangs"})
    begun = time.monotonic()
    start(tmp_path, rows=("omniglot-5w?s-order1",), hours=3 / 3600)
    assert 3 <= time.monotonic() - begun < 20
    output = capfd.readouterr().out
    assert "omniglot-5w1s-order1-seed0: stopped after 40 of 60,000 meta-steps: the budget is over" in output
    assert "with --rows omniglot-5w1s-order1 --seeds 0 --steps 40 it evaluates the stopped model, unless" in output
    assert "omniglot-5w5s-order1-seed0: not run: the budget is over" in output
    assert (tmp_path / "work" / "omniglot-5w1s-order1-seed0" / "saved").exists()
    assert not (tmp_path / "work" / "omniglot-5w5s-order1-seed0").exists()


def test_a_run_that_ignores_the_signal_is_killed(stub, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(reproduce, "GRACE", 0.3)
    stub({"omniglot-5w1s": "stubborn"})
    with pytest.raises(SystemExit) as end:
        start(tmp_path, rows=("omniglot-5w1s",), hours=3 / 3600)
    assert end.value.code == 1 and "did not exit within 0.3 s" in capfd.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_then_the_program(number, tmp_path):
    """The run gets one SIGTERM and saves, the page is rendered, and the exit status is 128 plus the signal's number."""
    work = tmp_path / "work"
    (tmp_path / "stub.py").write_text(STUB)
    program = (
        "import sys; from experiments import reproduce; from experiments.shared import command_line\n"
        "def stub(config, row, seed):\n"
        f"    return [sys.executable, {str(tmp_path / 'stub.py')!r}, str(config.workdir / row.name), 'hangs', '-']\n"
        "reproduce.command = stub\n"
        "command_line.run(reproduce.Config, reproduce.prepare, reproduce.main)"
    )
    options = ["--rows", "omniglot-5w1s", "omniglot-5w5s", "--data-dir", tmp_path, "--workdir", work]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, options)], env=environment, cwd=tmp_path, text=True,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not (work / "omniglot-5w1s" / "ready").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, number)  # As Ctrl-C does.
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert (work / "omniglot-5w1s" / "saved").exists() and not (work / "omniglot-5w5s").exists()
    assert (work / "index.html").exists()


BAD = [
    ({"rows": ("omniglot-5w1z",)}, "no row matches 'omniglot-5w1z'; similar rows are omniglot-5w1s, omniglot-5w5s"),
    ({"rows": ()}, "at least one"),
    ({"steps": 0}, "steps must be an integer of at least 1, but got 0"),
    ({"hours": float("nan")}, "hours must be positive and finite"),
    ({"seeds": (1, 1)}, r"must be different from each other, but got 1, 1"),
    ({"seeds": (-1,)}, "seeds must be an integer of at least 0, but got -1"),
    ({"rows": ("images-*",), "image_dir": Path("nowhere")}, "nowhere does not exist, but the row images-5w1s needs"),
    ({"results": (Path("nowhere"),)}, "results must be folders that exist, but nowhere"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_wrong_options_raise_before_a_run_starts(options, message, tmp_path):
    config = reproduce.Config(**{"data_dir": tmp_path, "workdir": tmp_path / "work", **options})
    with pytest.raises(ValueError, match=message):
        reproduce.prepare(config)
    assert not (tmp_path / "work").exists()
