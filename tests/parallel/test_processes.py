"""Tasks divided over devices and over processes: the numbers are those of one device, whatever is killed on the way."""

import json
import re
import signal
import socket
from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.commands import ROOT, ended, start
from helpers.resumable_run import SAVE_EVERY, TASKS, shared

import maml_jax
from maml_jax import losses
from maml_jax.nets import models
from maml_jax.parallel import processes
from maml_jax.parallel.task_axis import task_mesh
from maml_jax.runs.directory import RunDirectory
from maml_jax.tasks import episodes
from maml_jax.training import many_steps, train

SCRIPT = ROOT / "tests" / "helpers" / "resumable_run.py"
STEPS = 24
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def train_in(stack, compiled, workdir, processes, devices):
    numbers = ("{port}", "{processes}", "{process}")
    return start(stack, compiled, processes, devices, SCRIPT, workdir, STEPS, *numbers)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Rows and parameters of one device."""
    run = RunDirectory(tmp_path_factory.mktemp("alone"), "shared", {"steps": STEPS})
    params = shared(run, STEPS, TASKS, mesh=None)
    return run.rows(), params


def assert_same(alone, rows, params):
    reference, reference_params = alone
    for dtype, tolerance in TOLERANCE.items():
        mine, theirs = ([row for row in each if row["dtype"] == dtype] for each in (rows, reference))
        assert [row["step"] for row in mine] == [row["step"] for row in theirs]
        for name in ("loss", "grad_norm"):
            values = [[row[name] for row in each] for each in (mine, theirs)]
            np.testing.assert_allclose(*values, rtol=tolerance)
        for name, leaf in params[dtype].items():
            assert leaf.dtype == dtype
            np.testing.assert_allclose(leaf, reference_params[dtype][name], rtol=tolerance)


def assert_same_in(alone, workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    with np.load(workdir / "params.npz") as found:
        params = {dtype: {name: found[f"{name} {dtype}"] for name in ("in", "out")} for dtype in TOLERANCE}
    assert_same(alone, rows, params)


@pytest.mark.parametrize("processes, devices", [(1, 4), (4, 1)])
def test_four_devices_in_one_process_or_in_four_give_what_one_gives(alone, compiled, tmp_path, processes, devices):
    with ExitStack() as stack:
        told, statuses = ended(train_in(stack, compiled, tmp_path, processes, devices))
    assert statuses == [0] * processes, told
    assert_same_in(alone, tmp_path)
    made_by = json.loads((tmp_path / "run.json").read_text())["starts"][0]
    assert made_by["processes"] == processes and made_by["hardware"].startswith("4 x")


def test_two_processes_killed_and_stopped_on_the_way_end_the_same(alone, compiled, tmp_path):
    reached = 0
    for way in (signal.SIGKILL, signal.SIGTERM):
        with ExitStack() as stack:
            both = train_in(stack, compiled, tmp_path, 2, 1)
            while reached < 8:
                line = both[1].stdout.readline()
                assert line, both[1].stderr.read()
                reached = int(line.split()[1]) if line.startswith("float32") else reached  # Else it is Gloo's.
            both[1].send_signal(way)
            told, statuses = ended(both)
        if way == signal.SIGKILL:  # The other one does not wait for ever.
            assert statuses[1] == -signal.SIGKILL and statuses[0] not in (0, None), told
            reached = 0
        else:  # Both end after the same step.
            assert statuses == [128 + signal.SIGTERM] * 2, told
            saved = re.search(r"Stopped by SIGTERM; step (\d+) is saved", told[0])[1]
            assert (tmp_path / "checkpoints" / "float32" / saved).is_dir() and "is saved" not in told[1]
            assert "has lost" not in "".join(told)
    with ExitStack() as stack:
        told, statuses = ended(train_in(stack, compiled, tmp_path, 2, 1))
    assert statuses == [0, 0], told
    assert_same_in(alone, tmp_path)
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert len(starts) == 3 and SAVE_EVERY < STEPS


def test_what_process_0_finds_wrong_ends_all(compiled, tmp_path):
    (tmp_path / "file").touch()
    command = "-m experiments.sinusoid --tasks 4 --workdir".split()
    where = "--coordinator 127.0.0.1:{port} --processes {processes} --process {process}".split()
    with ExitStack() as stack:
        told, statuses = ended(start(stack, compiled, 2, 1, *command, tmp_path / "file", *where))
    assert statuses == [2, 2]
    assert f"error: {tmp_path / 'file'} is no directory" in told[0]
    assert f"error: process 0: {tmp_path / 'file'} is no directory" in told[1]


def test_tasks_that_cannot_be_divided_are_refused_before_anything_is_written(compiled, tmp_path):
    where = "--coordinator 127.0.0.1:{port} --processes {processes} --process {process}".split()
    with ExitStack() as stack:
        told, statuses = ended(
            start(stack, compiled, 2, 1, "-m", "experiments.sinusoid", "--workdir", tmp_path / "run", *where)
        )
    assert statuses == [2, 2] and all("tasks must be a multiple of 2" in text for text in told)
    assert not (tmp_path / "run").exists()


def test_processes_with_other_numbers_of_devices_are_refused(compiled):
    code = "from maml_jax import hosts; hosts.connect('127.0.0.1:{port}', {processes}, {process})"
    with ExitStack() as stack:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        both = [
            start(stack, compiled, 1, devices, "-c", code.format(port=port, processes=2, process=number))[0]
            for number, devices in enumerate((1, 2))
        ]
        told, statuses = ended(both)
    assert 0 not in statuses
    assert any(r"as many devices each, but got [1, 2]" in text for text in told)


def test_one_all_reduce_a_meta_step_and_every_device_draws_its_own():
    """Of the compiled program of many steps, with episodes drawn inside."""
    classes = episodes.equal_classes(np.random.default_rng(0).integers(0, 255, (30, 6, 7, 7), np.uint8))
    shape = episodes.EpisodeShape(ways=3, shots=1, queries=2, rotations="random")
    net = models.MLP((8,), 3)

    def draw(classes, step):
        return episodes.draw_episodes(jax.random.fold_in(jax.random.key(0), step), classes, 4, shape)

    learner = maml_jax.maml(
        losses.cross_entropy(models.apply_params(net)), maml_jax.sgd(0.1, steps=2), optax.adam(1e-3), mesh=task_mesh(4)
    )
    state = learner.init(net.init(jax.random.key(0), jnp.zeros((1, 7, 7, 1)))["params"])
    classes = jax.device_put(classes, state.step.sharding)
    program = jax.jit(many_steps(learner, draw)).lower(state, classes, 5).compile().as_text()
    exchanges = re.findall(r" = .* (all-[a-z]+|collective-[a-z]+|reduce-scatter)(?:-start)?\(", program)
    assert exchanges == ["all-reduce"]
    pixels = {tuple(map(int, dims.split(","))) for dims in re.findall(r"u8\[([\d,]+)\]", program)}
    drawn = {int(np.prod(dims)) for dims in pixels} - {30 * 6 * 7 * 7}
    assert max(drawn) == 2 * 3 * 3 * 7 * 7  # Of two tasks, not of four.


class TestOptions:
    @pytest.mark.parametrize(
        "given, message",
        [
            ((None, 2, None), "processes 2 is for a coordinator HOST:PORT, but got coordinator None"),
            ((None, None, 0), "process 0 is for a coordinator"),
            (("auto", 2, 0), "processes 2 and process 0 is for a coordinator HOST:PORT, but got coordinator auto"),
            (("here", 2, 0), "coordinator must be HOST:PORT of process 0, or 'auto', but got 'here'"),
            (("here:0", 2, 0), "coordinator must be HOST:PORT"),
            (("here:99999", 2, 0), "coordinator must be HOST:PORT"),
            (("here:1", 2, None), "needs processes and process too"),
            (("here:1", 0, 0), "processes must be an integer of at least 1, but got 0"),
            (("here:1", 2, 2), "process must be from 0 to 1, one less than processes, but got 2"),
            (("here:1", 2, -1), "process must be from 0 to 1"),
        ],
    )
    def test_are_checked_before_anything_is_connected(self, given, message):
        with pytest.raises(ValueError, match=message):
            processes.connect(*given)

    def test_tasks_that_cannot_be_shared_are_refused(self, monkeypatch):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(ValueError, match="tasks must be a multiple of 2, the number of processes, but got 3"):
            task_mesh(3)


def test_a_training_can_be_told_to_stop():
    def loss_fn(w, batch):
        return ((w - batch) ** 2).mean(), {}

    def draw(data, step):
        return maml_jax.Task(jnp.full((2, 3), 1.0 + step), jnp.ones((2, 3)))

    learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.1, steps=1), optax.sgd(0.1))
    steps = []
    calls = train(learner, learner.init(jnp.zeros(1)), draw, steps=20, steps_per_call=2, stop=lambda: steps[-1:] == [6])
    for _, row in calls:
        steps.append(row["step"])
    assert steps == [2, 4, 6]
