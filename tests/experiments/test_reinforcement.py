"""The reinforcement-learning experiments from the command line: short runs, and messages for wrong input."""

import dataclasses
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
from experiments.reinforcement import evaluation, options, paper
from experiments.reinforcement.timer import Timer
from experiments.shared import command_line
from maml_jax.parallel.backend import cores
from maml_jax.rl.policy import gaussian_mlp

TRAINED = "maml first_order pretrained oracle"
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
    (
        navigation,
        ["--outer-rate", "0.01"],
        "outer_rate is for --outer policy_gradient or promp, but got 0.01 with trpo",
    ),
    (navigation, ["--curvature-tasks", "5", "--outer", "promp"], "curvature_tasks is for --outer trpo"),
    (navigation, ["--sampling-term", "--tasks", "1"], "tasks must be at least 2 with sampling_term"),
    (
        navigation,
        ["--sampling-term", "--methods", "oracle"],
        "for the methods maml first_order, but got True",
    ),
    (navigation, ["--test-rates", "0.1", "0.1", "--methods", "oracle"], "test_rates is for the methods maml"),
    (navigation, ["--gae-lambda", "1.5"], "gae_lambda must be between 0 and 1, but got 1.5"),
    (navigation, ["--gae-lambda", "nan"], "gae_lambda must be between 0 and 1, but got nan"),
    (navigation, ["--seeds", "0", "600"], "seeds must not be 600 or 601, the seeds of the test tasks, but got 600"),
    *(
        (navigation, [f"--{name}", *value, "--methods", "random"], f"is for the methods {TRAINED}, but got {given}")
        for name, value, given in (
            ("steps", ["7"], "7"),
            ("tasks", ["3"], "3"),
            ("episodes", ["3"], "3"),
            ("inner-steps", ["2"], "2"),
            ("outer", ["promp"], "promp"),
            ("kl-limit", ["0.1"], "0.1"),
            ("curvature-tasks", ["3"], "3"),
            ("profile", [], "True"),
        )
    ),
    (locomotion, ["--render", "--methods", "oracle"], "render is for the methods maml"),
    (locomotion, ["--preset", "snail"], "preset"),
    (locomotion, ["--physics", "aristotle"], "physics"),
    (rl_speed, ["--curvature-share", "0"], "curvature_share must be above 0 and at most 1, but got 0"),
    (rl_speed, ["--problems"], "problems must have at least one value, but got none"),
    (rl_speed, ["--rounds", "0"], "rounds must be an integer of at least 1, but got 0"),
    (locomotion, ["--inner-steps", "0"], "inner_steps must be an integer of at least 1, but got 0"),
]


def start(module, arguments, monkeypatch, tmp_path):
    """Runs `python -m` in this process."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    with monkeypatch.context() as patch:
        patch.setattr(command_line.jax.config, "update", lambda *_: None)  # This process has its devices already.
        patch.setenv("NPROC", "3")  # The processes of other tests do not get it.
        patch.chdir(tmp_path)
        module.launch()


@pytest.mark.parametrize(("module", "arguments", "message"), BAD)
def test_wrong_input_ends_a_command_before_training(module, arguments, message, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        start(module, arguments, monkeypatch, tmp_path)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err + printed.out
    assert not (tmp_path / "runs").exists()


def test_a_missing_engine_names_the_extra_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(SystemExit) as end:
        start(locomotion, [], monkeypatch, tmp_path)
    assert end.value.code == 2 and "pip install 'maml-jax[mujoco]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "wrong", "calls_host"),
    [(locomotion, "--steps", True), (rl_speed, "--rounds", True), (navigation, "--steps", False)],
)
def test_commands_that_call_the_host_get_a_spare_thread(module, wrong, calls_host, monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(command_line, "use_cores", lambda small, calls_host: called.append(calls_host))
    with pytest.raises(SystemExit):
        start(module, [wrong, "0"], monkeypatch, tmp_path)
    assert called == [calls_host]


CALLS_FROM_ALL_DEVICES = """
import faulthandler; faulthandler.dump_traceback_later(60, exit=True)
from experiments.shared import command_line; command_line.use_cores(calls_host=True)
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


def test_large_calls_to_the_host_from_all_devices_do_not_hang():
    """Without a spare thread, every device waits for a copy, and no thread is left to copy."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"NPROC": "1"}
    command = [sys.executable, "-c", CALLS_FROM_ALL_DEVICES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(cores()), "100.0"], done.stderr


@pytest.fixture
def quickly_compiled():
    """Compiles programs without optimisation: each program runs once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_navigation_end_to_end(quickly_compiled, monkeypatch, capsys, tmp_path):
    arguments = ["--steps", 2, "--tasks", 3, "--episodes", 4, "--test-tasks", 3, "--test-episodes", 6,
               "--outer", "policy_gradient", "--workdir", "run"]  # fmt: skip
    start(navigation, arguments, monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    assert "  paper " in printed and "3 steps" in printed
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"returns.png", "paths-maml.png", "params.msgpack", "metrics.jsonl", "results.json"} <= written
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["environment"] == "navigation" and results["config"]["inner_rate"] == 0.1
    (maml,) = results["rows"]
    assert len(maml["return"]) == len(maml["half_width"]) == 4
    assert maml["num_nonfinite"] == 0 and np.ptp(maml["return"]) > 0
    of_task = np.array([line.split() for line in maml["return_of_task"]], float)
    assert of_task.shape == (4, 3) and np.array([line.split() for line in maml["tasks"]]).shape == (2, 3)
    np.testing.assert_allclose(of_task.mean(1), maml["return"], atol=0.01)
    assert maml["return_of_kind"] == {}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["method"], row["step"]) for row in rows] == [("maml", 1), ("maml", 2)]
    assert rows[0]["return"] < 0 and rows[0]["return_before"] < 0
    # A method may be added later. Trained methods are kept.
    with pytest.raises(SystemExit):
        start(navigation, [*arguments, "--methods", "pretrained"], monkeypatch, tmp_path)
    assert "methods was ['maml'], is ['pretrained']" in capsys.readouterr().err
    start(navigation, [*arguments, "--methods", "random", "maml"], monkeypatch, tmp_path)
    random, again = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert random["method"] == "random" and again["return"] == maml["return"]
    assert [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == rows


def untrained(inner_loss="logp", gae_lambda=1.0):
    """The initial policy of navigation."""
    policy = gaussian_mlp(2, 2)
    state = maml_jax.MetaState(jnp.int32(0), policy.init(jax.random.key(0)), (), ())
    return evaluation.Trained(navigation.ENVIRONMENT, policy, state, inner_loss, gae_lambda)


def test_gradient_steps_at_test_use_the_chosen_loss_and_advantages(quickly_compiled):
    """The losses 'dice' and 'logp' have different first derivatives, and lambda changes the advantages."""
    config = navigation.Config(test_tasks=2, test_episodes=3)
    logp, *others = (
        evaluation.evaluate(config, untrained(*options), ((0.1, 0.05),))["return"]
        for options in (("logp",), ("dice",), ("logp", 0.9))
    )
    for other in others:
        assert abs(other[1:] - logp[1:]).min() > 0.01 and other[0] == logp[0]


def test_training_and_test_get_the_options_of_the_learner(monkeypatch, tmp_path):
    """The learners are recorded, and the first one ends the command."""
    made = []

    def maml_rl(*arguments, **given):
        made.append(given)
        raise InterruptedError

    monkeypatch.setattr(navigation, "maml_rl", maml_rl)
    config = navigation.Config(
        gae_lambda=0.9, inner_loss="lvc", sampling_term=True, episodes=7, workdir=tmp_path / "run"
    )
    with pytest.raises(InterruptedError):
        navigation.main(config)
    (given,) = made
    names = ("gae_lambda", "inner_loss_name", "sampling_term", "episodes")
    assert [given[name] for name in names] == [0.9, "lvc", True, 7]


def test_locomotion_end_to_end(tmp_path):
    """Runs in a new process: the engine chooses the OpenGL library at import."""
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
    assert (
        len(row["return"]) == 4 and max(row["return"]) < 0 and row["length"] == [200] * 4 and row["num_nonfinite"] == 0
    )
    assert results["mujoco"] == metadata.version("mujoco")
    assert all((tmp_path / "run" / f"{name}.png").stat().st_size > 1000 for name in ("returns", "tasks"))
    # A run may be resumed with or without rendering.
    config = locomotion.Config(methods=("random",), test_tasks=2, test_episodes=1, workdir=tmp_path / "run")
    assert not locomotion.prepare(config).render
    if not rendered:
        pytest.skip("This machine has no OpenGL.")
    with Image.open(tmp_path / "run" / "random.png") as strip:
        assert strip.size == (8 * 160, 2 * 4 * 120) and len(strip.getcolors(1 << 24)) > 100


def test_methods_may_have_separate_test_rates():
    assert paper.rates_at_test("ant-velocity", "random") == ((1.0, 0.5),)
    assert paper.rates_at_test("ant-velocity", "maml") == ((0.1, 0.05),)
    assert len(paper.rates_at_test("navigation", "random")) == 5
    assert paper.TEST_RATES.keys() == paper.RETURNS.keys()


@pytest.mark.parametrize(("pairs", "expected"), [(((0.7, 0.6),), (0.7, 0.6)), (((9.0, 9.0), (0.1, 0.05)), (0.1, 0.05))])
def test_the_best_rates_on_other_tasks_are_used(pairs, expected, quickly_compiled):
    """The rates 9.0 ruin the policy."""
    config = navigation.Config(test_tasks=2, test_episodes=2)
    assert evaluation.evaluate(config, untrained(), pairs)["rates"] == expected


def test_the_table_has_the_returns_of_each_direction():
    returns = np.array([[1.0, 4.0], [2.0, 9.0], [3.0, 6.0]])
    found = evaluation.returns_by_task(np.array([1.0, -1.0, 1.0]), returns)
    assert found["tasks"] == ["1 -1 1"] and found["return_of_task"] == ["1.00 2.00 3.00", "4.00 9.00 6.00"]
    np.testing.assert_array_equal(found["return_of_kind"]["1"], [2, 5])
    np.testing.assert_array_equal(found["return_of_kind"]["-1"], [2, 9])
    row = {"method": "maml", "seed": 0, "rates": (0.1, 0.05), "return": [2, 6], "half_width": [1, 1], "improved": [1.0]}
    results = {"protocol": "", "paper": {}, "rows": [row | {"cpu_seconds": None, "num_nonfinite": 0.0} | found]}
    (line,) = [line for line in evaluation.table(results).splitlines() if "tasks of -1" in line]
    assert line.split() == ["tasks", "of", "-1", "2.00", "9.00"]


@pytest.mark.parametrize("restored", [False, True])
def test_the_processor_time_excludes_compilation(restored, monkeypatch):
    """A resumed run compiles after its first update, which comes from a checkpoint."""
    clock = [0.0]
    monkeypatch.setattr("time.process_time", lambda: clock[0])
    timer = Timer()
    for step in range(10, 25):
        clock[0] += {10: 0.0 if restored else 100.0, 11: 100.0 if restored else 2.0}.get(step, 2.0)
        timer.update(step)
        assert timer.seconds is None or step >= 20
    assert timer.seconds == 2.0


def test_presets_are_the_papers_settings():
    preset = locomotion.PRESETS["half-cheetah-direction"]
    assert (preset.tasks, preset.episodes, preset.inner_rate, preset.kl_limit) == (40, 20, 0.1, 0.02)
    preset = locomotion.PRESETS["ant-direction"]
    assert (preset.steps, preset.tasks, preset.episodes, preset.kl_limit) == (575, 40, 40, 0.01)
    config = navigation.Config(steps=7)
    assert (config.steps, config.tasks, config.episodes, config.kl_limit) == (7, 20, 20, 0.01)


def test_the_preset_on_the_command_line_sets_the_other_defaults(monkeypatch, tmp_path):
    assert locomotion.preset_of(["--steps", "3", "--preset=ant-direction"]) == "ant-direction"
    found = []
    monkeypatch.setattr(locomotion, "main", found.append)
    start(locomotion, ["--preset", "half-cheetah-direction", "--steps", "3"], monkeypatch, tmp_path)
    assert found == [dataclasses.replace(locomotion.PRESETS["half-cheetah-direction"], steps=3)]


def test_an_option_without_effect_raises():
    defaults = options.Config()
    with pytest.raises(ValueError, match=r"kl_limit is for --outer trpo, but got 0\.02 with promp"):
        options.check(dataclasses.replace(defaults, outer="promp", kl_limit=0.02), defaults)
    options.check(dataclasses.replace(defaults, outer="promp"), defaults)


def test_the_speed_benchmark_measures_each_part(quickly_compiled, monkeypatch, capsys, tmp_path):
    arguments = ["--problems", "navigation", "--tasks", 2, "--episodes", 3, "--rounds", 2, "--workdir", "speed"]
    start(rl_speed, arguments, monkeypatch, tmp_path)
    (row,) = json.loads((tmp_path / "speed" / "results.json").read_text())["rows"]
    assert all(len(row[kind][part]) == 2 for kind in ("cpu_seconds", "seconds") for part in ("episodes", "whole"))
    assert row["steps_per_cpu_second"] == pytest.approx(2 * 3 * 100 / np.median(row["cpu_seconds"]["episodes"]))
    assert sum(row["shares"].values()) == pytest.approx(1)
    assert (tmp_path / "speed" / "shares.png").stat().st_size > 1000
    assert "share of the processor time" in capsys.readouterr().out


def test_shares_are_the_times_that_each_part_adds():
    seconds = {"episodes": [1.0, 1.0, 9.0], "gradient": [3.0, 9.0, 3.0], "whole": [10.0, 10.0, 10.0]}
    row = rl_speed.row(
        "navigation", 500, seconds, {part: [2 * time for time in times] for part, times in seconds.items()}
    )
    np.testing.assert_allclose(list(row["shares"].values()), [0.2, 0.1, 0.7])
    assert (row["steps_per_cpu_second"], row["iterations_per_cpu_second"]) == (500, 0.1)
    assert (row["steps_per_second"], row["iterations_per_second"]) == (250, 0.05)
