"""The experiments from their command line: short runs on real data, and what they say to bad input."""

import json
import sys
import time
from contextlib import ExitStack

import jax
import jax.numpy as jnp
import pytest
from helpers.commands import launch, start, wait

from experiments import miniimagenet, omniglot, sinusoid
from experiments.few_shot import training
from maml_jax.inner import inner_loop

BAD = [
    ("sinusoid", ["--steps", "0"], "steps must be an integer of at least 1, but got 0"),
    ("sinusoid", ["--inner-rate", "nan"], "inner_rate must be positive and finite, but got nan"),
    ("sinusoid", ["--outer-rate", "-1"], "outer_rate must be positive and finite, but got -1"),
    ("sinusoid", ["--methods", "magic"], "methods"),
    ("sinusoid", ["--seeds", "-1"], "seeds must be an integer of at least 0, but got -1"),
    ("sinusoid", ["--shots", "many"], "shots"),
    ("omniglot", ["--order", "3"], "order"),
    ("omniglot", ["--ways", "1"], "ways must be an integer of at least 2, but got 1"),
    ("omniglot", ["--ways", "2000"], "ways must be at most the number of classes, 1100, but got 2000"),
    ("omniglot", ["--ways", "150"], "ways must be at most the number of classes, 100, but got 150"),
    ("omniglot", ["--shots", "0"], "shots must be an integer of at least 1, but got 0"),
    ("omniglot", ["--shots", "12", "--queries", "9"], "shots + queries must be at most 20"),
    ("omniglot", ["--inner-rate", "inf"], "inner_rate must be positive and finite, but got inf"),
    ("omniglot", ["--inner-steps", "0"], "inner_steps must be an integer of at least 1, but got 0"),
    ("omniglot", ["--preset", "20w1s", "--ways", "10"], "give either it or them, not both"),
    ("omniglot", ["--task-batch-size", "5"], "task_batch_size must divide the tasks of one device, 16, but got 5"),
    ("omniglot", ["--preset", "20w5s", "--ways", "5"], "give either it or them, not both"),
    ("omniglot", ["--rotations", "up"], "rotations"),
    ("omniglot", ["--method", "magic"], "method"),
    ("omniglot", ["--method", "reptile", "--order", "1"], "order 1 is for methods that differentiate the inner loop"),
    ("omniglot", ["--method", "maml++", "--anneal"], "anneal is for methods with a constant outer rate"),
    ("omniglot", ["--net", "mlp", "--normalisation", "tasknorm"], "'tasknorm' needs axes of space"),
    ("omniglot", ["--method", "pretrained", "--normalisation", "running"], "'running' gathers statistics"),
    ("miniimagenet", ["--data-dir", "nowhere"], "nowhere"),
    ("miniimagenet", ["--outer-rate", "0"], "outer_rate must be positive and finite, but got 0"),
    ("omniglot", ["--data-dir", "nowhere"], "--download"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_bad_input_ends_before_anything_long_starts(name, options, message, monkeypatch, capsys, tmp_path, request):
    """In this process, to be quick; the exit status of a real one is tested below."""
    from experiments.shared import command_line

    module = {"sinusoid": sinusoid, "omniglot": omniglot, "miniimagenet": miniimagenet}[name]
    if name == "omniglot" and "--data-dir" not in options:
        shared, cache = request.getfixturevalue("shared_data"), request.getfixturevalue("omniglot_cache")
        options = [*options, "--data-dir", str(shared / "omniglot"), "--cache-dir", str(cache)]
    monkeypatch.setattr(sys, "argv", [name, *options])
    monkeypatch.setattr(command_line.jax.config, "update", lambda *_: None)  # This process has its devices already.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        command_line.run(module.Config, module.prepare, getattr(module, "main", training.main))
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err + printed.out
    assert not (tmp_path / "runs").exists()


def test_bad_input_ends_a_real_process_with_status_2_and_soon(tmp_path):
    start = time.monotonic()
    ended = launch("experiments.omniglot", "--data-dir", tmp_path, "--cache-dir", tmp_path)
    assert ended.returncode == 2 and time.monotonic() - start < 30
    assert ended.stderr.startswith(f"error: The data directory {tmp_path} holds no Omniglot.")
    assert "Traceback" not in ended.stderr


def test_fine_tuning_of_curves_takes_the_best_of_its_rates():
    config = sinusoid.Config(test_tasks=20)
    params = sinusoid.net.init(jax.random.key(0), jnp.zeros((1, 1)))["params"]
    for rates, best in (((1e-6, 0.02, 10.0), 0.02), ((1e-6, 10.0), 1e-6)):
        method = sinusoid.methods(config)["pretrained"]._replace(test_rates=rates)
        state = sinusoid.tester(method, rates[0]).init(params)
        assert sinusoid.evaluate(config, method, state, 5, jax.random.key(1))["rate"] == best


def test_the_steady_recipe_has_an_inner_rate_of_its_own():
    for config in (sinusoid.Config(), sinusoid.Config(inner_rate=0.1)):
        steady = sinusoid.methods(config)["steady"]
        assert steady.test_rates == (0.01,) and steady.rates["inner"] == 0.01
        after, _ = inner_loop(steady.training, lambda x, _: (x**2 / 2, {}), jnp.array(1.0), (), None, steps=1)
        assert float(after) == pytest.approx(0.99)


def test_sinusoid_from_beginning_to_end(tmp_path):
    workdir = tmp_path / "run"
    ended = launch("experiments.sinusoid", "--steps", 1500, "--test-tasks", 50, "--workdir", workdir,
                   "--methods", "maml", "oracle")  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "K = 5" in ended.stdout and "the paper" in ended.stdout and "diverged" in ended.stdout
    results = json.loads((workdir / "results.json").read_text())
    errors = {(row["method"], row["shots"]): row["mean"] for row in results["rows"]}
    assert len(errors) == 6 and all(len(mean) == 11 for mean in errors.values())
    assert errors["maml", 10][1] < 0.95 * errors["maml", 10][0]  # One step helps already.
    assert {"errors.png", "fits.png", "params.msgpack", "metrics.jsonl"} <= {p.name for p in workdir.iterdir()}
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["method"] == "oracle"] == [1000, 1500]
    other = launch("experiments.sinusoid", "--workdir", workdir, "--methods", "maml", "first_order")
    assert other.returncode == 2 and "test_tasks" not in other.stderr
    assert "methods was ['maml', 'oracle'], is ['maml', 'first_order']" in other.stderr


def test_omniglot_from_beginning_to_end(shared_data, omniglot_cache, tmp_path):
    workdir = tmp_path / "run"
    common = ["--data-dir", shared_data / "omniglot", "--cache-dir", omniglot_cache, "--workdir", workdir]
    # Without convolutions: their programs take most of the time to compile, and are run by other tests.
    options = ["--net", "mlp", "--split", "vinyals", "--steps", 200, "--tasks", 8, "--test-tasks", 40]
    ended = launch("experiments.omniglot", *common, *options)
    assert ended.returncode == 0, ended.stderr
    assert "queries one by one" in ended.stdout and "published" in ended.stdout
    results = json.loads((workdir / "results.json").read_text())
    for label in ("queries together", "queries one by one"):
        found = results["test"][label]
        assert len(found["accuracy"]) == len(found["half_width"]) == 11
        assert f"queries {found['protocol']['query_mode']}" == label and found["protocol"]["classes"] == 423
    accuracy = results["test"]["queries together"]["accuracy"]
    assert accuracy[3] > accuracy[0] + 5  # Adaptation helps, after so few meta-steps too.
    for name in ("curves.png", "examples.png"):
        assert (workdir / name).stat().st_size > 10_000
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 200 and "val_accuracy" in rows[-1]
    (selected,) = [row for row in rows if row["step"] == results["selected"]["step"]]
    assert selected["val_accuracy"] == max(row["val_accuracy"] for row in rows if "val_accuracy" in row)

    # The saved model alone, evaluated on the same tasks, has the same accuracy.
    model = workdir / "best" / f"step-{selected['step']:07d}.msgpack"
    output = tmp_path / "evaluated.json"
    data = ["--data-dir", shared_data / "omniglot", "--cache-dir", omniglot_cache]
    ended = launch("experiments.evaluate", model, *data, "--tasks", 40, "--output", output)
    assert ended.returncode == 0, ended.stderr
    (evaluated,) = json.loads(output.read_text())["test"].values()
    assert evaluated == results["test"]["queries together"]
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_characters_in_two_processes_with_no_directory_in_common(shared_data, omniglot_cache, tmp_path):
    options = (
        "--net mlp --normalisation layer --split vinyals --steps 40 --tasks 8 --test-tasks 8 --workdir run".split()
    )
    options += "--coordinator 127.0.0.1:{port} --processes {processes} --process {process}".split()
    data = ["--data-dir", shared_data / "omniglot", "--cache-dir", omniglot_cache]
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    with ExitStack() as stack:
        both = start(stack, tmp_path / "compiled", 2, 1, "-m", "experiments.omniglot", *options, *data, folders=folders)
        told, statuses = wait(both)
    assert statuses == [0, 0], told
    results = json.loads((folders[0] / "run" / "results.json").read_text())
    assert len(results["test"]["queries together"]["accuracy"]) == 11 and results["made_by"]["processes"] == 2
    rows = [json.loads(line) for line in (folders[0] / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_accuracy" in row] == [20, 40]
    assert list(folders[1].iterdir()) == []


def test_recipes_are_the_papers():
    five, twenty, mini = (
        module.settle(module.Config(**options))[1]
        for module, options in ((omniglot, {}), (omniglot, {"preset": "20w5s"}), (miniimagenet, {"shots": 5}))
    )
    assert (five.tasks, five.inner_rate, five.inner_steps, five.queries, five.clip) == (32, 2.0, 1, 1, None)
    assert (twenty.ways, twenty.shots, twenty.tasks, twenty.inner_rate, twenty.inner_steps) == (20, 5, 16, 2.0, 5)
    assert (mini.tasks, mini.inner_rate, mini.inner_steps, mini.queries) == (4, 0.05, 5, 15)
    # The paper's code clips to 10 the gradient of a loss that is 75 / 5 times the mean.
    assert mini.clip == pytest.approx(10 / 15)
    assert omniglot.settle(omniglot.Config(preset="5w5s-mlp"))[1].net == "mlp"
    assert omniglot.settle(omniglot.Config(preset="20w1s", inner_steps=3))[1].inner_steps == 3
