"""The few-shot experiment, from the command line and as a function: training, selection, evaluation."""

import dataclasses
import json
from contextlib import ExitStack
from functools import partial

import jax
import numpy as np
import pytest
from helpers.commands import launch, start, wait
from helpers.few_shot import small_run

from experiments import evaluate, omniglot
from experiments.few_shot import testing
from maml_jax import evaluation
from maml_jax.runs import model_file
from maml_jax.runs.best import Best
from maml_jax.runs.files import to_jsonable
from maml_jax.runs.progress import Progress
from maml_jax.tasks.fixed import fixed_tasks


def test_models_are_selected_after_the_inner_steps_of_the_test(characters, tmp_path, small_net, monkeypatch):
    """The inner steps of training do not matter. With evaluation='transductive' there is no inductive evaluation."""
    validated, original = [], testing.accuracy

    def accuracy(run, state, groups, steps):
        validated.append((steps, original(run, state, groups, steps)))
        return validated[-1][1]

    monkeypatch.setattr(testing, "accuracy", accuracy)
    options = {"steps": 40, "tasks": 4, "test_tasks": 5, "evaluation": "transductive", "row": "omniglot-5w1s-mlp"}
    run = small_run(tmp_path, **options)
    results = omniglot.main((run, characters))
    assert run.inner_steps == 1 and [steps for steps, _ in validated] == [3, 3]
    assert results["selected"]["by"] == "accuracy on validation tasks after 3 inner steps"
    assert results["selected"]["step"] == (40 if validated[1][1] >= validated[0][1] else 20)
    assert list(results["test"]) == ["transductive"]
    assert results["row"] == "omniglot-5w1s-mlp" and results["config"]["tasks"] == 4
    (best,) = [path for path in (tmp_path / "run" / "best").iterdir() if str(results["selected"]["step"]) in path.name]
    assert model_file.load(best).description["selected_after"] == 3


def test_the_ensemble_averages_the_best_models(characters, tmp_path, small_net):
    run = small_run(tmp_path, steps=60, tasks=4, test_tasks=6, ensemble=True)
    found = omniglot.main((run, characters))["test"]
    assert list(found) == ["transductive", "inductive", "ensemble"]
    assert [each["protocol"]["models"] for each in found.values()] == [1, 1, 3]
    test_key = jax.random.split(jax.random.key(run.seed), 4)[3]
    (tasks,) = fixed_tasks(test_key, characters.test, 6, run.shape)()
    states = [testing.load_state(run, saved) for saved in Best(tmp_path / "run" / "best").models()]
    each = [np.exp(testing.predictor(run, state, 10)(tasks)[0]) for state in states]
    together = evaluation.predicted(np.mean(each, 0)) == np.asarray(tasks.query[1])[:, None]
    np.testing.assert_allclose(found["ensemble"]["accuracy"], 100 * together.mean((0, 2)), atol=1e-4)
    assert (found["ensemble"]["accuracy"] != found["transductive"]["accuracy"]).any()


def test_a_saved_pretrained_model_is_evaluated_at_its_fine_tuning_rate(characters, tmp_path, small_net, monkeypatch):
    """`experiments.evaluate` reads the rate that `experiments.omniglot` has chosen."""
    monkeypatch.setattr(testing, "FINE_TUNING_FACTORS", (0.03, 0.1))
    monkeypatch.setattr(omniglot.Run, "load", lambda run: characters)
    options = {"steps": 20, "tasks": 2, "test_tasks": 6, "evaluation": "transductive"}
    run = small_run(tmp_path, method="pretrained", **options)
    found = omniglot.main((run, characters))
    (path,) = (tmp_path / "run" / "best").iterdir()
    # A trained run that has no validated model is evaluated too.
    path.unlink()
    assert to_jsonable(omniglot.main((run, characters))["test"]) == to_jsonable(found["test"])
    again = evaluate.main(evaluate.prepare(evaluate.Config((path,), tasks=6)))
    assert to_jsonable(again[f"{path}, transductive"]) == to_jsonable(found["test"]["transductive"])
    protocol = found["test"]["nearest neighbour"]["protocol"]
    assert protocol["method"] == "nearest neighbour in the features of pretrained" and protocol["inner_steps"] == 0
    assert found["config"]["inner_rate"] in (0.06, 0.2)
    assert model_file.load(path).description["config"] == to_jsonable(found["config"])


def test_training_gets_the_schedule_of_the_outer_rate(characters, tmp_path, small_net, monkeypatch):
    """The message about a loss that is not finite shows the rate."""
    given = []

    def stopped(*_, rates, **options):
        given.append(rates)
        raise InterruptedError

    monkeypatch.setattr(omniglot, "resumable_train", stopped)
    for number, options in enumerate(({}, {"anneal": True})):
        with pytest.raises(InterruptedError):
            omniglot.main((small_run(tmp_path / str(number), steps=100, **options), characters))
    constant, annealed = given
    assert constant == {"inner": 2.0, "outer": 1e-3}
    assert annealed["outer"](0) == pytest.approx(1e-3) and annealed["outer"](100) == pytest.approx(1e-5)


def test_omniglot_end_to_end(shared_data, omniglot_cache, tmp_path):
    workdir = tmp_path / "run"
    common = ["--data-dir", shared_data / "omniglot", "--cache-dir", omniglot_cache, "--workdir", workdir]
    # The fully connected net compiles fast. Other tests run the convolutional net.
    options = ["--net", "mlp", "--split", "vinyals", "--steps", 200, "--tasks", 8, "--test-tasks", 40]
    ended = launch("experiments.omniglot", *common, *options)
    assert ended.returncode == 0, ended.stderr
    assert "inductive" in ended.stdout and "published" in ended.stdout
    results = json.loads((workdir / "results.json").read_text())
    for label in ("transductive", "inductive"):
        found = results["test"][label]
        assert len(found["accuracy"]) == len(found["half_width"]) == 11
        assert found["protocol"]["query_mode"] == label and found["protocol"]["classes"] == 423
    accuracy = results["test"]["transductive"]["accuracy"]
    assert accuracy[3] > accuracy[0] + 5  # Adaptation helps, after so few meta-steps too.
    assert results["row"] is None and results["published"] == [89.7, 1.1]
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
    assert evaluated == results["test"]["transductive"]
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_the_fast_recipe_from_the_command_line(shared_data, omniglot_cache, tmp_path):
    """One command trains both phases. The second phase starts from the last model of the first phase.

    Its outer rate is so small that it hardly changes this model.
    """
    options = ["--data-dir", shared_data / "omniglot", "--cache-dir", omniglot_cache, "--net", "mlp", "--steps", 20]
    options += ["--first-steps", 40, "--outer-rate", 1e-6, "--test-tasks", 20, "--evaluation", "transductive"]
    ended = launch("experiments.omniglot", "--recipe", "fast", *options, "--workdir", tmp_path / "run")
    assert ended.returncode == 0, ended.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    config = results["config"]
    assert (config["recipe"], config["method"], config["first_steps"]) == ("fast", "zero-head", 40)
    assert results["test"]["transductive"]["accuracy"][2] > 40  # Twice as many as by chance.
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [20]
    best = tmp_path / "run" / "first-phase" / "best"
    start, end = (
        model_file.load(path).params for path in (best / "step-0000040.msgpack", tmp_path / "run" / "last.msgpack")
    )
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), end, start)
    first = json.loads((tmp_path / "run" / "first-phase" / "run.json").read_text())["config"]
    assert (first["method"], first["train_ways"], first["steps"], first["anneal"]) == ("one-step", 40, 40, True)


def test_a_one_step_run_that_was_stopped_goes_on_to_the_same_bits(characters, tmp_path, small_net, monkeypatch):
    options = {"recipe": "one-step", "flips": True, "steps": 60, "train_ways": 6, "test_tasks": 4}
    whole = omniglot.main((small_run(tmp_path, **options), characters))
    monkeypatch.setattr(omniglot, "SAVE_EVERY", 20)

    class Stopped(Progress):
        def update(self, step, **values):
            super().update(step, **values)
            if step == 40:
                raise InterruptedError

    stopped = dataclasses.replace(small_run(tmp_path, **options), workdir=tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(omniglot, "Progress", Stopped)
        with pytest.raises(InterruptedError):
            omniglot.main((stopped, characters))
    resumed = omniglot.main((stopped, characters))
    assert to_jsonable(resumed["test"]) == to_jsonable(whole["test"])
    both = [model_file.load(tmp_path / name / "last.msgpack") for name in ("run", "stopped")]
    jax.tree.map(np.testing.assert_array_equal, both[0].params, both[1].params)
    jax.tree.map(np.testing.assert_array_equal, both[0].inner_params, both[1].inner_params)


def test_omniglot_in_two_processes_without_a_shared_directory(shared_data, omniglot_cache, tmp_path):
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
        errors, statuses = wait(both)
    assert statuses == [0, 0], errors
    results = json.loads((folders[0] / "run" / "results.json").read_text())
    assert len(results["test"]["transductive"]["accuracy"]) == 11 and results["made_by"]["processes"] == 2
    rows = [json.loads(line) for line in (folders[0] / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_accuracy" in row] == [20, 40]
    assert list(folders[1].iterdir()) == []
