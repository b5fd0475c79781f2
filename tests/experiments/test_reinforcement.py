"""The reinforcement-learning experiments from their command line: a short run, and what they say to bad input."""

import json
import os
import subprocess
import sys
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import maml_jax
from experiments import locomotion, navigation
from experiments.benchmarks import rl_speed
from experiments.reinforcement import options as reinforcement
from experiments.reinforcement import testing, training
from experiments.shared import command_line
from maml_jax.parallel.backend import cores
from maml_jax.rl.policy import gaussian_mlp
from maml_jax.runs.directory import RunDirectory

BAD = [
    (navigation, ["--steps", "0"], "steps must be an integer of at least 1, but got 0"),
    (navigation, ["--episodes", "0"], "episodes must be an integer of at least 1, but got 0"),
    (navigation, ["--test-tasks", "1"], "test_tasks must be an integer of at least 2, but got 1"),
    (navigation, ["--inner-rate", "nan"], "inner_rate must be positive and finite, but got nan"),
    (navigation, ["--kl-limit", "-1"], "kl_limit must be positive and finite, but got -1"),
    (navigation, ["--test-rates", "0.1", "0"], "test_rates must be positive and finite, but got 0"),
    (navigation, ["--methods", "magic"], "methods"),
    (navigation, ["--seeds", "1", "0", "1"], "seeds must be different from each other, but got 1, 0, 1"),
    (navigation, ["--curvature-tasks", "21"], "at most tasks, 20, but got 21"),
    (navigation, ["--curvature-tasks", "5", "--outer", "promp"], "curvature_tasks is for --outer trpo"),
    (navigation, ["--sampling-term", "--tasks", "1"], "it needs --tasks of at least 2"),
    (
        navigation,
        ["--sampling-term", "--methods", "oracle"],
        "for the methods maml first_order, but got True",
    ),
    (navigation, ["--test-rates", "0.1", "0.1", "--methods", "oracle"], "test_rates is for the methods maml"),
    (locomotion, ["--preset", "snail"], "preset"),
    (locomotion, ["--physics", "aristotle"], "physics"),
    (rl_speed, ["--curvature-share", "0"], "curvature_share must be above 0 and at most 1, but got 0"),
    (rl_speed, ["--problems"], "problems must name at least one, but got none"),
    (rl_speed, ["--rounds", "0"], "rounds must be an integer of at least 1, but got 0"),
    (locomotion, ["--inner-steps", "0"], "inner_steps must be an integer of at least 1, but got 0"),
]


def start(module, options, monkeypatch, tmp_path):
    """As `python -m` does, in this process."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, options)])
    with monkeypatch.context() as patch:
        patch.setattr(command_line.jax.config, "update", lambda *_: None)  # This process has its devices already.
        patch.setenv("NPROC", "3")  # Nor do others get what it sets.
        patch.chdir(tmp_path)
        module.launch()


@pytest.mark.parametrize(("module", "options", "message"), BAD)
def test_bad_input_ends_before_anything_long_starts(module, options, message, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        start(module, options, monkeypatch, tmp_path)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err + printed.out
    assert not (tmp_path / "runs").exists()


def test_a_missing_engine_ends_with_the_way_to_install_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(SystemExit) as end:
        start(locomotion, [], monkeypatch, tmp_path)
    assert end.value.code == 2 and "pip install 'maml-jax[mujoco]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "wrong", "calls_host"),
    [(locomotion, "--steps", True), (rl_speed, "--rounds", True), (navigation, "--steps", False)],
)
def test_who_calls_the_host_says_so(module, wrong, calls_host, monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(command_line, "use_cores", lambda small, calls_host: called.append(calls_host))
    with pytest.raises(SystemExit):
        start(module, [wrong, "0"], monkeypatch, tmp_path)
    assert called == [calls_host]


CALLS_FROM_ALL_DEVICES = """
import faulthandler; faulthandler.dump_traceback_later(60, exit=True)
from experiments import command_line; command_line.use_cores(calls_host=True)
import jax, jax.numpy as jnp, numpy as np
from maml_jax.parallel.task_axis import local_mesh
P = jax.sharding.PartitionSpec

def through_host(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.lax.fori_loop(0, 100, lambda _, x: jax.pure_callback(lambda x: np.asarray(x) + 1, shape, x), x)

mesh = local_mesh()
divided = jax.shard_map(through_host, mesh=mesh, in_specs=P("tasks"), out_specs=P("tasks"), check_vma=False)
x = jnp.zeros((2 * jax.device_count(), 100_000))
print(jax.device_count(), float(jax.jit(divided if mesh else through_host)(x).min()))
"""


def test_large_calls_to_the_host_from_all_devices_at_once_end():
    """Without a thread to spare each waits for a copy that none is left to make."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"NPROC": "1"}
    command = [sys.executable, "-c", CALLS_FROM_ALL_DEVICES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(cores()), "100.0"], done.stderr


@pytest.fixture
def quickly_compiled():
    """Programs that run once are not worth optimising."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_navigation_from_beginning_to_end(quickly_compiled, monkeypatch, capsys, tmp_path):
    options = ["--steps", 2, "--tasks", 3, "--episodes", 4, "--test-tasks", 3, "--test-episodes", 6,
               "--outer", "policy_gradient", "--workdir", "run"]  # fmt: skip
    start(navigation, options, monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    assert "the paper" in printed and "3 steps" in printed
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"returns.png", "paths-maml.png", "params.msgpack", "metrics.jsonl", "results.json"} <= written
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (maml,) = results["rows"]
    assert len(maml["return"]) == len(maml["half_width"]) == 4
    assert maml["broken"] == 0 and np.ptp(maml["return"]) > 0
    of_task = np.array([line.split() for line in maml["return_of_task"]], float)
    assert of_task.shape == (4, 3) and np.array([line.split() for line in maml["tasks"]]).shape == (2, 3)
    np.testing.assert_allclose(of_task.mean(1), maml["return"], atol=0.01)
    assert maml["return_of_kind"] == {}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["method"], row["step"]) for row in rows] == [("maml", 1), ("maml", 2)]
    assert rows[0]["return"] < 0 and rows[0]["return_before"] < 0
    # A method may be added later: what is trained stays.
    with pytest.raises(SystemExit):
        start(navigation, [*options, "--methods", "random"], monkeypatch, tmp_path)
    assert "methods was ['maml'], is ['random']" in capsys.readouterr().err
    start(navigation, [*options, "--methods", "random", "maml"], monkeypatch, tmp_path)
    random, again = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert random["method"] == "random" and again["return"] == maml["return"]
    assert [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == rows


def test_gradient_steps_at_test_are_of_the_loss_asked_for(quickly_compiled, tmp_path):
    """DiCE's first derivative is another than that of 'logp'."""
    found = {}
    for loss in ("logp", "dice"):
        config = reinforcement.Config(
            methods=("random",), inner_loss=loss, test_tasks=2, test_episodes=3, workdir=tmp_path / loss
        )
        prepared = reinforcement.prepare(config, navigation.problem())
        directory = RunDirectory(tmp_path / loss, "run", {})
        trained = training.meta_train(prepared, directory, "random", 0)
        found[loss] = testing.evaluate(prepared, "random", trained)["return"]
        directory.close()
    assert abs(found["dice"][1:] - found["logp"][1:]).min() > 0.01 and found["dice"][0] == found["logp"][0]


def test_locomotion_from_beginning_to_end(tmp_path):
    """In a process of its own: the engine chooses its OpenGL when it is imported."""
    command = [sys.executable, "-m", "experiments.locomotion", "--methods", "random", "--test-tasks", "2",
               "--test-episodes", "1", "--workdir", str(tmp_path / "run")]  # fmt: skip
    environment = {"MUJOCO_GL": "egl", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **os.environ}

    def started(*more):
        return subprocess.run([*command, *more], env=environment, capture_output=True, text=True)

    done = started("--render")
    rendered = "Rendering found no OpenGL" not in done.stderr
    done = done if rendered else started()
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert any(line[:4] == ["random", "0", "0.1,", "0.05"] for line in lines) and "-254.80" in done.stdout
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (row,) = results["rows"]
    assert len(row["return"]) == 4 and max(row["return"]) < 0 and row["length"] == [200] * 4 and row["broken"] == 0
    assert results["mujoco"] == metadata.version("mujoco")
    assert all((tmp_path / "run" / f"{name}.png").stat().st_size > 1000 for name in ("returns", "tasks"))
    # What is trained may be drawn afterwards, or not again.
    config = locomotion.Config(methods=("random",), test_tasks=2, test_episodes=1, workdir=tmp_path / "run")
    assert not locomotion.prepare(config).config.render
    if not rendered:
        pytest.skip("This machine has no OpenGL.")
    with Image.open(tmp_path / "run" / "random.png") as strip:
        assert strip.size == (8 * 160, 2 * 4 * 120) and len(strip.getcolors(1 << 24)) > 100


@pytest.mark.parametrize(("given", "rates"), [(None, (0.3, 0.2)), ((0.7, 0.6), (0.7, 0.6))])
def test_methods_may_have_test_rates_of_their_own(given, rates, monkeypatch, tmp_path):
    """Which what the user gives overrules."""
    tried = []

    def tester(trained, rates, episodes):
        tried.append(rates)
        raise InterruptedError

    monkeypatch.setattr(testing, "tester", tester)
    config = reinforcement.Config(methods=("random",), test_rates=given, workdir=tmp_path / "run")
    problem = navigation.problem()._replace(own_test_rates={"random": (0.3, 0.2)})
    prepared = reinforcement.prepare(config, problem)
    policy = gaussian_mlp(2, 2)
    params = policy.init(jax.random.key(0))
    trained = testing.Trained(problem.environment, policy, maml_jax.MetaState(jnp.int32(0), params, (), ()))
    with jax.disable_jit(), pytest.raises(InterruptedError):
        testing.evaluate(prepared, "random", trained)
    assert tried == [rates]


def test_returns_are_told_of_each_direction():
    returns = np.array([[1.0, 4.0], [2.0, 9.0], [3.0, 6.0]])
    told = testing.by_task(np.array([1.0, -1.0, 1.0]), returns)
    assert told["tasks"] == ["1 -1 1"] and told["return_of_task"] == ["1.00 2.00 3.00", "4.00 9.00 6.00"]
    np.testing.assert_array_equal(told["return_of_kind"]["1"], [2, 5])
    np.testing.assert_array_equal(told["return_of_kind"]["-1"], [2, 9])
    row = {"method": "maml", "seed": 0, "rates": (0.1, 0.05), "return": [2, 6], "half_width": [1, 1], "improved": [1.0]}
    results = {"protocol": "", "paper": {}, "rows": [row | {"cpu_seconds": None, "broken": 0.0} | told]}
    (line,) = [line for line in testing.table(results).splitlines() if "tasks of -1" in line]
    assert line.split() == ["tasks", "of", "-1", "2.00", "9.00"]


@pytest.mark.parametrize("restored", [False, True])
def test_a_meta_iterations_cost_is_without_compilation(restored, monkeypatch, tmp_path):
    """Which a run that goes on does after it has handed over what was restored."""
    clock = [0.0]

    def handed_over(learner, state, *args, **options):
        for step in range(10, 25):
            clock[0] += {10: 0.0 if restored else 100.0, 11: 100.0 if restored else 2.0}.get(step, 2.0)
            yield state, {"step": step, "return": 0.0}

    monkeypatch.setattr(training, "resumable_train", handed_over)
    monkeypatch.setattr("time.process_time", lambda: clock[0])
    prepared = reinforcement.prepare(reinforcement.Config(workdir=tmp_path / "run"), navigation.problem())
    directory = RunDirectory(tmp_path / "run", "run", {})
    assert training.meta_train(prepared, directory, "maml", 0).cpu_seconds == 2.0
    directory.close()


def test_the_recipes_are_the_papers():
    setting = reinforcement.Config().resolve(locomotion.problem("half-cheetah-direction"))
    assert (setting.tasks, setting.episodes, setting.inner_rate, setting.kl_limit) == (40, 20, 0.1, 0.02)
    setting = reinforcement.Config(steps=7).resolve(navigation.problem())
    assert (setting.steps, setting.tasks, setting.episodes, setting.kl_limit) == (7, 20, 20, 0.01)


def test_speed_is_told_by_parts(quickly_compiled, monkeypatch, capsys, tmp_path):
    options = ["--problems", "navigation", "--tasks", 2, "--episodes", 3, "--rounds", 2, "--workdir", "speed"]
    start(rl_speed, options, monkeypatch, tmp_path)
    (row,) = json.loads((tmp_path / "speed" / "results.json").read_text())["rows"]
    assert all(len(row[kind][part]) == 2 for kind in ("cpu_seconds", "seconds") for part in ("episodes", "whole"))
    assert row["steps_per_cpu_second"] == pytest.approx(2 * 3 * 100 / np.median(row["cpu_seconds"]["episodes"]))
    assert sum(row["shares"].values()) == pytest.approx(1)
    assert (tmp_path / "speed" / "shares.png").stat().st_size > 1000
    assert "where the time goes" in capsys.readouterr().out


def test_shares_are_of_what_each_part_adds():
    seconds = {"episodes": [1.0, 1.0, 9.0], "gradient": [3.0, 9.0, 3.0], "whole": [10.0, 10.0, 10.0]}
    row = rl_speed.row(
        "navigation", 500, seconds, {part: [2 * time for time in times] for part, times in seconds.items()}
    )
    np.testing.assert_allclose(list(row["shares"].values()), [0.2, 0.1, 0.7])
    assert (row["steps_per_cpu_second"], row["iterations_per_cpu_second"]) == (500, 0.1)
    assert (row["steps_per_second"], row["iterations_per_second"]) == (250, 0.05)
