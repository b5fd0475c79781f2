"""Runs that are killed, stopped, or without room on the disk go on; locks and configurations, for real.

`MAML_JAX_KILLS=30 pytest tests/test_checkpoint_files.py -k killed` kills more often than the default.
"""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.resumable_run import PER_CALL, SAVE_EVERY, setting

import maml_jax
from maml_jax.runs import checkpoint, signals
from maml_jax.runs.checkpoint import Checkpoints
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.files import InUseError, Lock, WorkdirError
from maml_jax.runs.resumable import Validate, check_steps, resumable_train

KILLS = int(os.environ.get("MAML_JAX_KILLS", "4"))
ROOT = Path(maml_jax.__file__).parents[1]

# Where orbax fails in the midst of reading or writing, it leaves coroutines and an event loop behind.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def kept(compiled):
    """All tests of this file and their processes share what is compiled."""


@pytest.fixture(scope="module")
def environment(compiled):
    # With the same XLA_FLAGS as here: to the same bits comes only the same program.
    environment = os.environ | {name.upper(): str(value) for name, value in compiled.items()}
    return environment | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


@contextmanager
def process(environment, *arguments):
    """A process whose output is read line by line, and that does not outlive the test."""
    command = [sys.executable, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        watchdog = threading.Timer(90, child.kill)  # So that nothing waits for its output for ever.
        watchdog.start()
        try:
            yield child
        finally:
            watchdog.cancel()
            child.kill()


def in_this_process(run, steps, *, until=None, **options):
    """The same training as `resumable_run`'s; left at step `until`, as by an error in the loop."""
    learner, state, draw = setting()
    options = {"steps_per_call": PER_CALL, "save_every": SAVE_EVERY} | options
    rows = []
    for state, row in resumable_train(learner, state, draw, jax.random.key(1), steps=steps, run=run, **options):
        rows.append(row)
        if row["step"] == until:
            break
    return state, rows


def opened(path, steps=0):
    return RunDirectory(path, "tiny", {"steps": steps}, mutable_fields={"steps"})


def assert_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


class TestGoingOn:
    def test_to_the_same_bits_wherever_it_was_left(self, tmp_path, capsys):
        whole, rows = in_this_process(opened(tmp_path / "whole"), 26)
        assert [row["step"] for row in rows] == list(range(2, 27, 2))
        left, handed_over = tmp_path / "left", []
        for until in (2, 6, 10, 18, None):  # Before the first checkpoint, at one, between two, and to the end.
            run = opened(left)
            state, rows = in_this_process(run, 26, until=until)
            run.close()
            handed_over.append(rows[0]["step"])
        assert handed_over == [2, 2, 6, 6, 18]
        assert_equal(state, whole)
        assert (left / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
        assert "metrics.jsonl: 2 rows after step 6 are dropped" in capsys.readouterr().err

        state, rows = in_this_process(run := opened(left), 26)  # A training that has ended hands over its end.
        assert rows == [row for row in run.rows() if row["step"] == 26]
        assert_equal(state, whole)
        run.close()
        with pytest.raises(WorkdirError, match="has 26 meta-steps behind it, more than the 10 that are wanted"):
            in_this_process(opened(left), 10)
        before = sorted(left.rglob("*"))
        with pytest.raises(WorkdirError, match="checkpoints has 26 meta-steps behind it, more than the 25"):
            check_steps(left, 25)
        check_steps(left, 26)
        assert sorted(left.rglob("*")) == before

    def test_more_steps_than_at_first(self, tmp_path, capsys):
        for steps in (9, 26):
            run = opened(tmp_path / "more", steps)
            state, _ = in_this_process(run, steps)
            run.close()
        assert "note: steps was 9, is 26." in capsys.readouterr().err
        assert_equal(state, in_this_process(opened(tmp_path / "whole"), 26)[0])

    def test_trainings_that_share_a_directory_keep_to_their_own_rows(self, tmp_path):
        for until in ((12, 8), (None, None)):
            run = opened(tmp_path)
            for name, step in zip("ab", until):
                in_this_process(run, 12, until=step, labels={"method": name, "seed": 0})
            run.close()
        assert [row["step"] for row in run.rows(method="a")] == [row["step"] for row in run.rows(method="b")]
        assert len(run.rows()) == 12
        assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"a-0", "b-0"}
        with pytest.raises(WorkdirError, match=r"checkpoints/[ab]-0 has 12 meta-steps behind it"):
            check_steps(tmp_path, 11)
        check_steps(tmp_path, 12)
        check_steps(None, 1)
        (tmp_path / "checkpoints" / "12345" / "9").mkdir(parents=True)  # Named by a number: no step.
        check_steps(tmp_path, 12)

    def test_a_validation_that_is_not_finite_is_no_best(self, tmp_path):
        found = {4: np.inf, 8: 3.0, 12: np.nan, 16: 2.0}
        run = opened(tmp_path)
        validate = Validate(4, lambda state: {"val_loss": found[int(state.step)]}, lambda row: -row["val_loss"])
        in_this_process(run, 16, validate=validate)
        run.close()
        assert [row["val_loss"] for row in run.rows() if "val_loss" in row] == [None, 3.0, None, 2.0]
        with closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
            assert checkpoints.best_step() == 16

    def test_the_newest_and_the_best_are_kept(self, tmp_path):
        scores = dict(zip(range(4, 25, 4), (1.0, 5.0, 5.0, 2.0, 3.0, 1.0)))
        validate = Validate(4, lambda state: {"accuracy": scores[int(state.step)]}, lambda row: row["accuracy"])
        for until in (12, None):
            run = opened(tmp_path)
            in_this_process(run, 24, until=until, validate=validate, keep=1)
            run.close()
        assert [row["accuracy"] for row in run.rows() if "accuracy" in row] == list(scores.values())
        assert sorted(os.listdir(tmp_path / "checkpoints")) == ["24", "8"]
        with closing(Checkpoints(tmp_path / "checkpoints", keep=1)) as checkpoints:
            assert checkpoints.restore_best(setting()[1]).step == 8

    def test_options_are_checked_at_once(self, tmp_path):
        for option in ("steps", "steps_per_call", "save_every", "keep"):
            with pytest.raises(ValueError, match=f"{option} must be an integer of at least 1, but got 0"):
                resumable_train(None, None, None, run=None, **{"steps": 1, "steps_per_call": 1, "save_every": 1, option: 0})  # fmt: skip # noqa: E501


def test_killed_at_any_moment_it_ends_the_same(environment, tmp_path):
    """SIGKILL in training and in saving, then SIGTERM and SIGINT; each is followed by the same command."""
    rng = random.Random(0)
    steps, reached, in_mid_save = 100 * (KILLS + 2), 0, 0  # It must not be done before the signal comes.
    ways = [signal.SIGKILL] * KILLS + [signal.SIGTERM, signal.SIGINT]
    workdir = tmp_path / "killed"
    for number, way in enumerate(ways):
        with process(environment, ROOT / "tests" / "helpers" / "resumable_run.py", workdir, steps) as child:
            first = int(child.stdout.readline())
            assert reached - SAVE_EVERY <= first <= reached + PER_CALL, (first, reached)
            target, reached = first + rng.randrange(0, 2 * SAVE_EVERY, PER_CALL), first
            while reached < target:
                reached = int(child.stdout.readline())
            time.sleep(rng.uniform(0, 0.15))  # About as long as saving takes.
            child.send_signal(way)
            reached = max([reached, *map(int, child.stdout)])
            told = child.stderr.read()
            assert child.wait() == (-way if way == signal.SIGKILL else 128 + way), told
        unfinished = list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))
        in_mid_save += bool(unfinished)
        assert "Traceback" not in told and "damaged" not in told
        if way != signal.SIGKILL:  # Nothing is lost.
            assert f"step {reached} is saved" in told and (workdir / "checkpoints" / str(reached)).is_dir()
            assert not unfinished
    print(f"{KILLS} kills, {in_mid_save} of them in the midst of saving")
    with process(environment, ROOT / "tests" / "helpers" / "resumable_run.py", workdir, steps) as child:
        assert int(child.stdout.readline()) == reached
        child.communicate()
        assert child.returncode == 0
    learner_state, _ = in_this_process(opened(tmp_path / "whole"), steps)
    with closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        assert_equal(checkpoints.restore(learner_state).state, learner_state)
    assert (workdir / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


class TestSignals:
    def test_a_second_one_ends_at_once_even_where_python_does_not_run(self, environment, tmp_path):
        with process(environment, ROOT / "tests" / "helpers" / "resumable_run.py", tmp_path, 20, "hang") as child:
            while child.stdout.readline() != "hanging\n":
                assert child.poll() is None
            child.send_signal(signal.SIGINT)
            assert "SIGINT: saving after this call" in child.stderr.readline()
            time.sleep(0.3)
            assert child.poll() is None
            child.send_signal(signal.SIGTERM)
            assert child.wait(timeout=5) == 128 + signal.SIGTERM

    def test_nothing_is_left_behind(self):
        def surroundings():
            descriptor = signal.set_wakeup_fd(-1)
            signal.set_wakeup_fd(descriptor)
            handlers = [signal.getsignal(number) for number in signals.SIGNALS]
            files = [path for path in Path("/proc/self/fd").iterdir() if path.is_fifo()]
            return descriptor, handlers, sorted(files), any(t.name == "signals" for t in threading.enumerate())

        before = surroundings()
        with signals.deferred() as stop_request:
            os.kill(os.getpid(), signal.SIGTERM)
            end = time.monotonic() + 5
            while stop_request.signal is None and time.monotonic() < end:
                time.sleep(0.01)
            assert stop_request.signal == signal.SIGTERM
        assert surroundings() == before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    def test_what_is_ignored_stays_ignored_and_other_threads_are_let_be(self):
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with signals.deferred() as stop_request:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
            assert stop_request.signal is None
        finally:
            signal.signal(signal.SIGINT, handler)
        stop_requests = []

        def elsewhere():
            with signals.deferred() as stop_request:
                stop_requests.append(stop_request)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert stop_requests[0].signal is None


@contextmanager
def largest_file(size):
    """As a disk that is full after so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class TestDisk:
    def test_a_full_one_stops_the_run_which_then_goes_on(self, tmp_path):
        run = opened(tmp_path / "run")
        learner, state, draw = setting()
        with pytest.raises(WorkdirError, match=r"Cannot write .*checkpoints/12: .*goes on from the last checkpoint"):
            for _, row in resumable_train(
                learner, state, draw, jax.random.key(1), steps=20, steps_per_call=2, run=run, save_every=6
            ):
                if row["step"] == 10:
                    limit = largest_file(1000)
                    limit.__enter__()
        limit.__exit__(None, None, None)
        run.close()
        run = opened(tmp_path / "run")
        state, rows = in_this_process(run, 20)
        assert rows[0]["step"] == 6
        assert_equal(state, in_this_process(opened(tmp_path / "whole"), 20)[0])

    def test_what_another_thread_of_a_failed_save_still_writes_is_removed_too(self, tmp_path, monkeypatch):
        """Orbax reports the first of its threads that fails, while others go on."""
        leftover = tmp_path / "12.orbax-checkpoint-tmp"
        (leftover / "state").mkdir(parents=True)
        rmdir, late = os.rmdir, iter(["one", "another"])

        def after_a_late_file(path, **options):
            if (name := next(late, None)) is not None:
                (leftover / "state" / name).touch()
            rmdir(path, **options)

        monkeypatch.setattr(os, "rmdir", after_a_late_file)
        with closing(Checkpoints(tmp_path)):
            assert not leftover.exists() and next(late, None) is None

    def test_what_is_not_ours_to_remove_is_not_tried_for_ever(self, tmp_path, monkeypatch):
        (tmp_path / "12.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
        monkeypatch.setattr(checkpoint, "STRAGGLERS", 0.1)

        def never(path, **options):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", path)

        monkeypatch.setattr(os, "rmdir", never)
        with pytest.raises(WorkdirError, match=r"Cannot write .*12.orbax-checkpoint-tmp: .*not empty"):
            Checkpoints(tmp_path)

    def test_a_row_that_does_not_fit_is_named_and_its_rest_dropped(self, tmp_path, capsys):
        run = opened(tmp_path)
        run.log(step=1, loss=0.5)
        size = (tmp_path / "metrics.jsonl").stat().st_size
        with (
            largest_file(size + 10),
            pytest.raises(WorkdirError, match=r"metrics.jsonl: File too large"),
        ):
            run.log(step=2, loss=0.25)
        run.close()
        assert (tmp_path / "metrics.jsonl").stat().st_size == size + 10
        run = opened(tmp_path)
        assert 'metrics.jsonl: line 2 is cut or damaged, and dropped: b\'{"step": 2' in capsys.readouterr().err
        run.log(step=2, loss=0.25)
        assert [row["step"] for row in run.rows()] == [1, 2]

    def test_where_nothing_can_be_written(self, tmp_path):
        file = tmp_path / "file"
        file.touch()
        for path in (file, file / "below"):
            with pytest.raises(WorkdirError, match=f"Cannot write {path}.*another --workdir"):
                RunDirectory(path, "it", {})
            with pytest.raises(WorkdirError, match=f"Cannot write {path}"):
                Checkpoints(path)
        # Root may write anywhere, so as someone else.
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
                RunDirectory(closed, "it", {})
        finally:
            if root:
                os.seteuid(0)


class TestMetrics:
    def test_what_is_no_row_is_dropped_and_named(self, tmp_path, capsys):
        run = opened(tmp_path)
        in_this_process(run, 12)
        run.close()
        whole = (tmp_path / "metrics.jsonl").read_bytes()
        lines = whole.splitlines(keepends=True)
        (tmp_path / "metrics.jsonl").write_bytes(b"".join([*lines[:2], b"\xff{\n", *lines[2:5], lines[5][:20]]))
        run = opened(tmp_path)
        _, (row,) = in_this_process(run, 12)
        told = capsys.readouterr().err
        assert "line 3 is cut or damaged" in told and "line 7 is cut or damaged" in told
        assert "has lost 1 rows up to step 12" in told
        assert row["step"] == 12 and [row["step"] for row in run.rows()] == [2, 4, 6, 8, 10]
        run.close()
        (tmp_path / "metrics.jsonl").write_bytes(whole[:-1])  # The row is whole: only its end is missing.
        opened(tmp_path)
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole


CONFIG = {"rate": 0.1, "steps": 10, "where": Path("a"), "sizes": (1, 2)}


class TestConfiguration:
    def test_harmless_changes_go_on_and_are_recorded(self, tmp_path, capsys):
        RunDirectory(tmp_path, "it", CONFIG).close()
        content = json.loads((tmp_path / "run.json").read_text())
        content["starts"][0]["versions"]["jax"] = "0.1"
        (tmp_path / "run.json").write_text(json.dumps(content))
        capsys.readouterr()
        RunDirectory(tmp_path, "it", CONFIG | {"steps": 20}, mutable_fields={"steps"}).close()
        told = capsys.readouterr().err
        assert "steps was 10, is 20" in told and f"jax was 0.1, is {jax.__version__}: the numbers may differ" in told
        content = json.loads((tmp_path / "run.json").read_text())
        assert content["config"]["steps"] == 20 and content["starts"][1]["changed"] == {"steps": [10, 20]}

    def test_harmful_ones_are_refused_and_listed(self, tmp_path):
        RunDirectory(tmp_path, "it", CONFIG).close()
        before = (tmp_path / "run.json").read_bytes()
        other = {"rate": 0.2, "steps": 20, "sizes": (1, 3), "new": True}
        for attempt in (RunDirectory.check, lambda path, *args, **kw: RunDirectory(path, "it", *args, **kw)):
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

    def test_the_default_place_is_that_of_the_same_unfinished_run(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        first = RunDirectory(None, "it", CONFIG)
        assert RunDirectory(None, "it", CONFIG).path.name == "it-2"  # The first is in use.
        first.close()
        again = RunDirectory(None, "it", CONFIG)
        assert again.path == first.path
        again.write_results({})
        assert len(json.loads((again.path / "results.json").read_text())["made_by"]["earlier_starts"]) == 1
        again.close()
        assert RunDirectory(None, "it", CONFIG | {"rate": 0.2}).path.name == "it-3"
        assert RunDirectory(None, "it", CONFIG).path.name == "it-2"


def test_a_lock_lasts_as_long_as_its_process(environment, tmp_path):
    code = (
        "import sys, time; from maml_jax.runs.files import *; lock = Lock(Path(sys.argv[1])); print(1); time.sleep(60)"
    )
    with process(environment, "-uc", code, tmp_path) as child:
        child.stdout.readline()
        for attempt in (lambda: RunDirectory(tmp_path, "it", {}), lambda: RunDirectory.check(tmp_path, {})):
            with pytest.raises(InUseError, match=rf"{tmp_path} is in use by process {child.pid} on .*--workdir"):
                attempt()
    with closing(Lock(tmp_path)), pytest.raises(InUseError, match=r"this process itself: close\(\) what has it open"):
        RunDirectory(tmp_path, "it", {})
    Lock(tmp_path).close()


class TestNotFinite:
    def test_the_run_stops_with_a_finite_checkpoint_and_says_why(self, tmp_path):
        learner, state, draw = setting()

        def explosive(key, step):
            task = draw(key, step)
            return task._replace(query=(task.query[0], task.query[1] * jnp.where(step == 17, jnp.nan, 1.0)))

        options = {"steps": 40, "steps_per_call": 5, "save_every": 5, "run": opened(tmp_path)}
        rates = {"inner": 0.01, "outer": lambda steps: 1 / steps}
        told = (
            r"At meta-step 18 .*loss nan.*The rates were: inner 0.01, outer 0.0588235. The last checkpoint, "
            rf"{tmp_path / 'checkpoints' / '15'}, is finite"
        )
        with pytest.raises(FloatingPointError, match=told):
            for state, _ in resumable_train(learner, state, explosive, jax.random.key(1), rates=rates, **options):
                pass
        with closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
            found = checkpoints.restore(state)
        assert found.step == 15 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.state))
