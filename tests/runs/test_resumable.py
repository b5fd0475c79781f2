"""An interrupted training resumes bit for bit, after errors, kills, signals and full disks.

`MAML_JAX_KILLS=30 pytest tests/runs/test_resumable.py -k killed` kills more often than the default.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.commands import ROOT
from helpers.disk import file_size_limit
from helpers.resumable_run import SAVE_EVERY, STEPS_PER_CALL, open_run, setting, train_in
from helpers.rl_cases import ENVIRONMENT, POLICY

import maml_jax
from maml_jax import losses
from maml_jax.algorithms.maml_plus_plus import maml_plus_plus
from maml_jax.nets import models
from maml_jax.rl.meta_rl import draw_task_batch, maml_rl
from maml_jax.rl.outer import promp
from maml_jax.runs.checkpoint import Checkpoints
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.files import WorkdirError
from maml_jax.runs.resumable import Validate, check_steps, resumable_train
from maml_jax.runs.signals import Interrupted
from maml_jax.tasks import host_memory, omniglot
from maml_jax.tasks.episodes import EpisodeShape, equal_classes

KILLS = int(os.environ.get("MAML_JAX_KILLS", "4"))
SCRIPT = ROOT / "tests" / "helpers" / "resumable_run.py"

# When reading or writing fails, orbax leaves coroutines and an event loop behind.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def share_compiled_programs(compiled):
    """All tests of this file and their child processes share compiled programs."""


@pytest.fixture(scope="module")
def environment(compiled):
    # Child processes use the XLA_FLAGS of this process, because only equal programs give equal bits.
    environment = os.environ | {name.upper(): str(value) for name, value in compiled.items()}
    return environment | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


@contextmanager
def process(environment, *arguments):
    """Starts a process with readable output, and kills the process at the end of the block."""
    command = [sys.executable, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        watchdog = threading.Timer(600, child.kill)  # A silent process must not block the test forever.
        watchdog.start()
        try:
            yield child
        finally:
            watchdog.cancel()
            child.kill()


def assert_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


class TestResuming:
    def test_a_run_that_stops_at_any_step_resumes_to_the_same_bits(self, tmp_path, capsys):
        reference, rows = train_in(open_run(tmp_path / "reference"), 26)
        assert [row["step"] for row in rows] == list(range(2, 27, 2))
        left, first_steps = tmp_path / "left", []
        for until in (2, 6, 10, 18, None):  # Before, at and between checkpoints; then to the end.
            run = open_run(left)
            state, rows = train_in(run, 26, until=until)
            run.close()
            first_steps.append(rows[0]["step"])
        assert first_steps == [2, 2, 6, 6, 18]
        assert_equal(state, reference)
        assert (left / "metrics.jsonl").read_bytes() == (tmp_path / "reference" / "metrics.jsonl").read_bytes()
        assert "metrics.jsonl: 2 rows after step 6 are removed" in capsys.readouterr().err

        state, rows = train_in(run := open_run(left), 26)  # A finished training yields its last state.
        assert rows == [row for row in run.rows() if row["step"] == 26]
        assert_equal(state, reference)
        run.close()
        with pytest.raises(WorkdirError, match="has taken 26 meta-steps, but steps is 10"):
            train_in(open_run(left), 10)
        before = sorted(left.rglob("*"))
        with pytest.raises(WorkdirError, match="checkpoints has taken 26 meta-steps, but steps is 25"):
            check_steps(left, 25)
        check_steps(left, 26)
        assert sorted(left.rglob("*")) == before

    def test_a_run_can_resume_with_more_steps(self, tmp_path, capsys):
        for steps in (9, 26):
            run = open_run(tmp_path / "longer", steps)
            state, _ = train_in(run, steps)
            run.close()
        assert "note: steps was 9, is 26." in capsys.readouterr().err
        assert_equal(state, train_in(open_run(tmp_path / "reference"), 26)[0])

    def test_trainings_in_one_directory_have_separate_rows_and_checkpoints(self, tmp_path):
        for until in ((12, 8), (None, None)):
            run = open_run(tmp_path)
            for name, step in zip("ab", until):
                train_in(run, 12, until=step, labels={"method": name, "seed": 0})
            run.close()
        assert [row["step"] for row in run.rows(method="a")] == [row["step"] for row in run.rows(method="b")]
        assert len(run.rows()) == 12
        assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"a-0", "b-0"}
        with pytest.raises(WorkdirError, match=r"checkpoints/[ab]-0 has taken 12 meta-steps"):
            check_steps(tmp_path, 11)
        check_steps(tmp_path, 12)
        check_steps(None, 1)
        (tmp_path / "checkpoints" / "12345" / "9").mkdir(parents=True)  # The number is a label, not a step.
        check_steps(tmp_path, 12)

    def test_labels_name_a_folder_inside_of_the_run(self, tmp_path):
        run = open_run(tmp_path / "run")
        train_in(run, 2, labels={"data": "../../out", "method": "/out"})
        run.close()
        assert os.listdir(tmp_path) == ["run"]
        assert os.listdir(run.path / "checkpoints") == ["%2E.%2F..%2Fout-%2Fout"]

    def test_damaged_and_lost_rows_are_reported(self, tmp_path, capsys):
        run = open_run(tmp_path)
        train_in(run, 12)
        run.close()
        lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (tmp_path / "metrics.jsonl").write_bytes(b"".join([*lines[:2], b"\xff{\n", *lines[2:5], lines[5][:20]]))
        run = open_run(tmp_path)
        _, (row,) = train_in(run, 12)
        notes = capsys.readouterr().err
        assert "line 3 is truncated or damaged" in notes and "line 7 is truncated or damaged" in notes
        assert "has lost 1 rows up to step 12" in notes
        assert row["step"] == 12 and [row["step"] for row in run.rows()] == [2, 4, 6, 8, 10]

    def test_options_are_checked_at_once(self):
        for option in ("steps", "steps_per_call", "save_every", "keep"):
            options = {"steps": 1, "steps_per_call": 1, "save_every": 1, option: 0}
            with pytest.raises(ValueError, match=f"{option} must be an integer of at least 1, but got 0"):
                resumable_train(None, None, None, run=None, **options)


class TestValidation:
    def test_the_interval_counts_meta_steps(self, tmp_path):
        """Calls take two steps. A call that passes a multiple of the interval validates, and so does the last call."""
        for every, expected in ((3, [4, 6, 10]), (5, [6, 10])):
            run = open_run(tmp_path / str(every))
            train_in(run, 10, validate=Validate(every, lambda state: {"validated": int(state.step)}), save_every=100)
            run.close()
            rows = [row for row in run.rows() if "validated" in row]
            assert [row["step"] for row in rows] == [row["validated"] for row in rows] == expected

    def test_every_validated_state_is_logged_and_saved(self, tmp_path):
        accuracies = dict(zip(range(4, 25, 4), (1.0, 5.0, np.inf, 2.0, np.nan, 1.0)))
        validated = []

        def metrics(state):
            validated.append(int(state.step))
            return {"accuracy": accuracies[int(state.step)]}

        for until in (12, None):
            run = open_run(tmp_path)
            train_in(run, 24, until=until, validate=Validate(4, metrics), keep=1, save_every=24)
            run.close()
        assert validated == [4, 8, 12, 16, 20, 24]  # Resuming at step 12 needs no second validation.
        rows = [row for row in run.rows() if "accuracy" in row]
        assert [row["step"] for row in rows] == validated
        assert [row["accuracy"] for row in rows] == [1.0, 5.0, None, 2.0, None, 1.0]
        assert os.listdir(tmp_path / "checkpoints") == ["24"]


def test_a_run_that_is_killed_at_any_moment_ends_in_the_same_bits(environment, tmp_path):
    """Sends SIGKILL while training and while saving, then SIGTERM and SIGINT. Starts the same command after each."""
    rng = random.Random(0)
    steps, reached, kills_while_saving = 100 * (KILLS + 2), 0, 0  # Enough steps for every signal to arrive in time.
    workdir = tmp_path / "killed"
    for number in [signal.SIGKILL] * KILLS + [signal.SIGTERM, signal.SIGINT]:
        with process(environment, SCRIPT, workdir, steps) as child:
            first = int(child.stdout.readline())
            assert reached - SAVE_EVERY <= first <= reached + STEPS_PER_CALL, (first, reached)
            target, reached = first + rng.randrange(0, 2 * SAVE_EVERY, STEPS_PER_CALL), first
            while reached < target:
                reached = int(child.stdout.readline())
            time.sleep(rng.uniform(0, 0.15))  # About as long as saving takes.
            child.send_signal(number)
            reached = max([reached, *map(int, child.stdout)])
            errors = child.stderr.read()
            assert child.wait() == (-number if number == signal.SIGKILL else 128 + number), errors
        unfinished = list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))
        kills_while_saving += bool(unfinished)
        assert "Traceback" not in errors and "damaged" not in errors
        if number != signal.SIGKILL:  # The last step is saved.
            assert f"step {reached} is saved" in errors and (workdir / "checkpoints" / str(reached)).is_dir()
            assert not unfinished
    print(f"{KILLS} kills, {kills_while_saving} of them while saving")
    with process(environment, SCRIPT, workdir, steps) as child:
        assert int(child.stdout.readline()) == reached
        child.communicate()
        assert child.returncode == 0
    reference, _ = train_in(open_run(tmp_path / "reference"), steps)
    with closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        assert_equal(checkpoints.restore(reference).state, reference)
    assert (workdir / "metrics.jsonl").read_bytes() == (tmp_path / "reference" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("until", [8, 2 * SAVE_EVERY])  # Between two checkpoints, and at a checkpoint.
def test_a_signal_saves_the_last_step_once(until, tmp_path, capsys):
    run = open_run(tmp_path)
    learner, state, draw = setting()
    options = {"steps": 1000, "steps_per_call": STEPS_PER_CALL, "save_every": SAVE_EVERY, "run": run}
    with pytest.raises(Interrupted) as end:
        for state, row in resumable_train(learner, state, draw, jax.random.key(1), **options):
            if row["step"] == until:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.5)
    run.close()
    assert end.value.code == 128 + signal.SIGTERM
    assert f"SIGTERM: step {row['step']} is saved" in capsys.readouterr().err
    assert max(int(name) for name in os.listdir(tmp_path / "checkpoints")) == row["step"] < 1000
    assert run.rows()[-1]["step"] == row["step"]


def test_a_signal_after_the_last_step_is_not_lost(tmp_path, monkeypatch):
    close = Checkpoints.close

    def close_slowly(checkpoints):
        close(checkpoints)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)

    monkeypatch.setattr(Checkpoints, "close", close_slowly)
    with closing(open_run(tmp_path)) as run, pytest.raises(Interrupted):
        train_in(run, 2)
    assert os.listdir(tmp_path / "checkpoints") == ["2"]


def test_a_second_signal_ends_the_process_at_once_even_outside_of_python(environment, tmp_path):
    with process(environment, SCRIPT, tmp_path, 20, "hang") as child:
        while child.stdout.readline() != "hanging\n":
            assert child.poll() is None
        child.send_signal(signal.SIGINT)
        assert "SIGINT: stopping after this call" in child.stderr.readline()
        time.sleep(0.3)
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=5) == 128 + signal.SIGTERM


def test_a_full_disk_stops_the_run_which_then_resumes(tmp_path):
    run = open_run(tmp_path / "run")
    learner, state, draw = setting()
    with pytest.raises(WorkdirError, match=r"Cannot write .*checkpoints/12: .*resumes from the last checkpoint"):
        for _, row in resumable_train(
            learner, state, draw, jax.random.key(1), steps=20, steps_per_call=2, run=run, save_every=6
        ):
            if row["step"] == 10:
                limit = file_size_limit(1000)
                limit.__enter__()
    limit.__exit__(None, None, None)
    run.close()
    run = open_run(tmp_path / "run")
    state, rows = train_in(run, 20)
    assert rows[0]["step"] == 6
    assert_equal(state, train_in(open_run(tmp_path / "reference"), 20)[0])


def test_nan_stops_the_run_with_a_finite_checkpoint_and_the_rates(tmp_path):
    learner, state, draw = setting()

    def draw_nan(key, step):
        task = draw(key, step)
        return task._replace(query=(task.query[0], task.query[1] * jnp.where(step == 17, jnp.nan, 1.0)))

    options = {"steps": 40, "steps_per_call": 5, "save_every": 5, "run": open_run(tmp_path)}
    rates = {"inner": 0.01, "outer": lambda steps: 1 / steps}
    message = (
        r"At meta-step 18 .*loss nan.*The rates were: inner 0.01, outer 0.0588235. The last checkpoint, "
        rf"{tmp_path / 'checkpoints' / '15'}, is finite"
    )
    with pytest.raises(FloatingPointError, match=message):
        for state, _ in resumable_train(learner, state, draw_nan, jax.random.key(1), rates=rates, **options):
            pass
    with closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        restored = checkpoints.restore(state)
    assert restored.step == 15 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.state))


class Case(NamedTuple):
    learner: maml_jax.MetaLearner
    state: maml_jax.MetaState
    draw: Any
    data: Any


CASE_STEPS = 9


def characters(request):
    """MAML++ on Omniglot: the order of the derivative, the loss weights and Adam's rate change during training."""
    data, cache = request.getfixturevalue("shared_data"), request.getfixturevalue("omniglot_cache")
    images = omniglot.load(data / "omniglot", cache)
    classes = equal_classes(images.images[:50])
    net = models.MLP((16,), 3, "batch")
    learner = maml_plus_plus(
        losses.cross_entropy(models.apply_params(net)),
        learning_rate=0.4,
        steps=2,
        meta_steps=CASE_STEPS,
        multi_step_until=6,
        first_order_until=4,
    )
    params = net.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    draw, data = host_memory.episodes_by_step(jax.random.key(1), classes, 2, EpisodeShape(3, 1, 2, "random"))
    return Case(learner, learner.init(params), draw, data)


def navigation(_):
    """Point navigation: several steps of Adam on the same episodes, with a schedule."""
    outer = promp(optax.adam(optax.cosine_decay_schedule(1e-2, 100)), steps=2)
    learner = maml_rl(ENVIRONMENT, POLICY, maml_jax.sgd(0.1, steps=1), outer, episodes=3, inner_loss_name="lvc")

    def draw(key, step):
        return draw_task_batch(ENVIRONMENT, jax.random.fold_in(key, step), 2)

    return Case(learner, learner.init(POLICY.init(jax.random.key(0))), draw, jax.random.key(1))


def train_case(case, path, until=None):
    """Trains until step `until`, or to the end."""
    run = RunDirectory(path, "run", {})
    for state, row in resumable_train(
        *case, steps=CASE_STEPS, steps_per_call=1, run=run, save_every=2, labels={"kind": "a"}
    ):
        if row["step"] == until:
            break
    run.close()
    return state


@pytest.mark.parametrize("make", [characters, navigation])
def test_few_shot_and_rl_trainings_resume_to_the_same_bits(make, request, tmp_path):
    case = make(request)
    reference = train_case(case, tmp_path / "reference")
    for until in (3, 4, None):  # Between two checkpoints, at a checkpoint, and to the end.
        state = train_case(case, tmp_path / "left", until)
    jax.tree.map(np.testing.assert_array_equal, state, reference)
    assert int(state.step) == CASE_STEPS
    change = jax.tree.map(lambda leaf, start: float(abs(leaf - start).max()), state.params, case.state.params)
    assert all(value > 0 for value in jax.tree.leaves(change)), change
    rows = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("reference", "left")]
    assert rows[0] == rows[1]
