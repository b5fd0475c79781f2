"""Run directories: rows, results, configurations, and errors of the disk."""

import importlib.util
import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.disk import file_size_limit

from maml_jax.runs import directory
from maml_jax.runs.checkpoint import Checkpoints
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.files import Lock, WorkdirError


def test_a_run_writes_metrics_and_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(None, "run")
    run.log(step=1, loss=np.float32(0.5), bad=float("nan"))
    path = run.write_results({"accuracy": np.array([1.0, np.inf]), "where": tmp_path})
    assert json.loads((run.path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5, "bad": None}
    results = json.loads(path.read_text())
    assert results["accuracy"] == [1.0, None] and results["where"] == str(tmp_path)
    assert {"command", "commit", "versions", "hardware", "finished"} <= set(results["made_by"])
    assert sorted(p.name for p in run.path.iterdir()) == [
        ".lock",
        "events",
        "metrics.jsonl",
        "results.json",
        "run.json",
    ]
    assert RunDirectory(None, "run").path.name == "run-2"
    run.close()
    with pytest.raises(FileExistsError, match="already holds a run"):
        RunDirectory(run.path, "run")


class TestDefaultDirectory:
    def test_an_unfinished_run_of_the_same_configuration_is_resumed(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        first = RunDirectory(None, "run", CONFIG)
        assert RunDirectory(None, "run", CONFIG).path.name == "run-2"  # Another object holds the first directory.
        first.close()
        again = RunDirectory(None, "run", CONFIG)
        assert again.path == first.path
        again.write_results({})
        assert len(json.loads((again.path / "results.json").read_text())["made_by"]["earlier_starts"]) == 1
        again.close()
        assert RunDirectory(None, "run", CONFIG | {"rate": 0.2}).path.name == "run-3"
        assert RunDirectory(None, "run", CONFIG).path.name == "run-2"

    def test_two_runs_that_start_at_the_same_time_get_different_directories(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        others = []

        def after_another_process(path):
            if not others:
                others.append(Lock(path))
            return Lock(path)

        monkeypatch.setattr(directory, "Lock", after_another_process)
        run = RunDirectory(None, "run", {})
        assert others and run.path.name == "run-2"
        run.close()
        others[0].close()


class TestMetrics:
    def test_a_row_that_does_not_fit_on_the_disk_is_reported_and_removed(self, tmp_path, capsys):
        run = RunDirectory(tmp_path, "run", {})
        run.log(step=1, loss=0.5)
        size = (tmp_path / "metrics.jsonl").stat().st_size
        with file_size_limit(size + 10), pytest.raises(WorkdirError, match=r"metrics.jsonl: File too large"):
            run.log(step=2, loss=0.25)
        run.close()
        assert (tmp_path / "metrics.jsonl").stat().st_size == size + 10
        run = RunDirectory(tmp_path, "run", {})
        note = 'metrics.jsonl: line 2 is truncated or damaged and is removed: b\'{"step": 2'
        assert note in capsys.readouterr().err
        run.log(step=2, loss=0.25)
        assert [row["step"] for row in run.rows()] == [1, 2]

    @pytest.mark.parametrize("line", ['{"step": null}', '{"step": "5"}', '{"step": true}', "[1]", "[" * 100_000])
    def test_a_line_of_another_form_is_reported_and_removed(self, tmp_path, capsys, line):
        run = RunDirectory(tmp_path, "run", {})
        run.log(step=1, loss=0.5)
        run.close()
        (tmp_path / "metrics.jsonl").write_text(f'{line}\n{{"step": 1}}\n')
        run = RunDirectory(tmp_path, "run", {})
        assert "metrics.jsonl: line 1 is truncated or damaged and is removed" in capsys.readouterr().err
        run.drop_rows_after(0)
        assert run.rows() == []
        with pytest.raises(WorkdirError, match="step must be a number, but is 'five'"):
            run.log(step="five")
        run.close()

    def test_a_missing_end_of_line_is_repaired(self, tmp_path):
        run = RunDirectory(tmp_path, "run", {})
        run.log(step=1, loss=0.5)
        run.close()
        intact = (tmp_path / "metrics.jsonl").read_bytes()
        (tmp_path / "metrics.jsonl").write_bytes(intact[:-1])
        RunDirectory(tmp_path, "run", {}).close()
        assert (tmp_path / "metrics.jsonl").read_bytes() == intact


CONFIG = {"rate": 0.1, "steps": 10, "where": Path("a"), "sizes": (1, 2)}


class TestConfiguration:
    def test_allowed_changes_are_reported_and_recorded(self, tmp_path, capsys):
        RunDirectory(tmp_path, "run", CONFIG).close()
        content = json.loads((tmp_path / "run.json").read_text())
        content["starts"][0]["versions"]["jax"] = "0.1"
        content["starts"][0] |= {"hardware": "4 x abacus", "xla_flags": "--fast", "commit": "abc"}
        (tmp_path / "run.json").write_text(json.dumps(content))
        capsys.readouterr()
        RunDirectory(tmp_path, "run", CONFIG | {"steps": 20}, mutable_fields={"steps"}).close()
        notes = capsys.readouterr().err
        assert "steps was 10, is 20" in notes and f"jax was 0.1, is {jax.__version__}: the numbers may differ" in notes
        for change in (
            "commit was abc, is ",
            f"hardware was 4 x abacus, is {len(jax.devices())} x cpu",
            "xla_flags was --fast",
        ):
            assert change in notes
        content = json.loads((tmp_path / "run.json").read_text())
        assert content["config"]["steps"] == 20 and content["starts"][1]["changed"] == {"steps": [10, 20]}

    def test_a_list_may_get_more_entries_but_lose_none(self, tmp_path):
        RunDirectory(tmp_path, "run", {"seeds": (0, 1)}).close()
        RunDirectory(tmp_path, "run", {"seeds": (0, 1, 2)}, appendable_fields={"seeds"}).close()
        with pytest.raises(WorkdirError, match=r"seeds was \[0, 1, 2\], is \[0, 1\]"):
            RunDirectory(tmp_path, "run", {"seeds": (0, 1)}, appendable_fields={"seeds"})

    def test_other_changes_raise_an_error_that_lists_them(self, tmp_path):
        RunDirectory(tmp_path, "run", CONFIG).close()
        before = (tmp_path / "run.json").read_bytes()
        other = {"rate": 0.2, "steps": 20, "sizes": (1, 3), "new": True}
        for attempt in (RunDirectory.check, lambda path, *args, **kw: RunDirectory(path, "run", *args, **kw)):
            with pytest.raises(WorkdirError) as error:
                attempt(tmp_path, other, mutable_fields={"steps"})
            assert str(error.value).splitlines()[1:-1] == [
                "  new was 'absent', is True",
                "  rate was 0.1, is 0.2",
                "  sizes was [1, 2], is [1, 3]",
                "  where was 'a', is 'absent'",
            ]
            with pytest.raises(FileExistsError, match="already holds a run"):
                attempt(tmp_path, None)
        assert (tmp_path / "run.json").read_bytes() == before
        (tmp_path / "run.json").write_bytes(before[:50])
        with pytest.raises(WorkdirError, match=r"run.json cannot be read"):
            RunDirectory.check(tmp_path, CONFIG)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda run: run.clear(), "name is missing; config is missing; jax is missing; starts is missing"),
            (lambda run: run.update(config=[1]), "config must be an object or null, but is [1]"),
            (lambda run: run.update(starts=[]), "starts must be a list with entries, but is []"),
            (lambda run: run["starts"][0].pop("versions"), "starts[0].versions is missing"),
            (lambda run: run["starts"][0].update(started=None), "starts[0].started must be a text, but is None"),
        ],
    )
    def test_a_record_of_another_form_is_named(self, tmp_path, monkeypatch, change, message):
        monkeypatch.chdir(tmp_path)
        run = RunDirectory(None, "run", CONFIG)
        run.close()
        content = json.loads((run.path / "run.json").read_text())
        change(content)
        (run.path / "run.json").write_text(json.dumps(content))
        for attempt in (RunDirectory.check, lambda path, config: RunDirectory(path, "run", config)):
            with pytest.raises(WorkdirError, match=re.escape(f"run.json has another form: {message}. Restore")):
                attempt(run.path, CONFIG)
        assert RunDirectory(None, "run", CONFIG).path.name == "run-2"  # A damaged default directory is passed over.

    def test_other_settings_of_jax_are_refused(self, tmp_path):
        RunDirectory(tmp_path, "run", CONFIG).close()
        before = jax.config.jax_default_prng_impl
        jax.config.update("jax_default_prng_impl", "rbg")
        try:
            with pytest.raises(WorkdirError, match="jax_default_prng_impl was 'threefry2x32', is 'rbg'"):
                RunDirectory.check(tmp_path, CONFIG)
        finally:
            jax.config.update("jax_default_prng_impl", before)
        RunDirectory.check(tmp_path, CONFIG)


def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for attempt in (RunDirectory.check, lambda path, **options: RunDirectory(path, "run", **options)):
        with pytest.raises(WorkdirError, match=r"path must name a directory, but is empty. Give '\.'"):
            attempt("")
        with pytest.raises(ValueError, match="wandb mine needs the package wandb: pip install wandb"):
            attempt(tmp_path / "run", wandb="mine")
    assert not list(tmp_path.iterdir())


def test_the_error_names_a_path_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        with pytest.raises(WorkdirError, match=f"Cannot write {path}.*another --workdir"):
            RunDirectory(path, "run", {})
        with pytest.raises(WorkdirError, match=f"Cannot write {path}"):
            Checkpoints(path)
    # Root may write everywhere, so a process of root changes its user first.
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    root = os.geteuid() == 0
    for parent in closed.parents if root else ():
        if parent.stat().st_uid == 0:
            parent.chmod(parent.stat().st_mode | 0o055)
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(WorkdirError, match=f"Cannot write {closed / '.lock'}: Permission denied"):
            RunDirectory(closed, "run", {})
    finally:
        if root:
            os.seteuid(0)
