"""The record of a run: recipes, derived values, and the fields that a resumed run must share."""

import dataclasses
import json
from pathlib import Path

import pytest
from helpers.few_shot import small_run

from experiments import miniimagenet, omniglot
from experiments.few_shot.run import NEUTRAL
from maml_jax.runs.directory import RunDirectory
from maml_jax.runs.files import to_jsonable
from maml_jax.tasks.episodes import ImageClasses


def test_recipes_are_the_papers():
    five, twenty, mini = (
        each.resolved() for each in (omniglot.Run(), omniglot.Run(preset="20w5s"), miniimagenet.Run(shots=5))
    )
    assert (five.tasks, five.inner_rate, five.inner_steps, five.queries, five.clip) == (32, 2.0, 1, 1, None)
    assert (twenty.ways, twenty.shots, twenty.tasks, twenty.inner_rate, twenty.inner_steps) == (20, 5, 16, 2.0, 5)
    assert (mini.tasks, mini.inner_rate, mini.inner_steps, mini.queries) == (4, 0.05, 5, 15)
    # The authors' code clips the gradient of a loss that is 75 / 5 times the mean to 10.
    assert mini.clip == pytest.approx(10 / 15)
    assert omniglot.Run(preset="5w5s-mlp").resolved().net == "mlp"
    given = omniglot.Run(preset="20w1s", inner_steps=3, clip=0.5).resolved()
    assert (given.inner_steps, given.clip) == (3, 0.5)


def test_the_one_step_recipe():
    """The training is the same for all ways and shots of a data set: inner rates are in proportion to the ways."""
    twenty, five, mini = (
        each.resolved()
        for each in (
            omniglot.Run(recipe="one-step", preset="20w1s"),
            omniglot.Run(recipe="one-step", preset="5w5s"),
            miniimagenet.Run(recipe="one-step"),
        )
    )
    for run in (twenty, five, mini):
        assert (run.method, run.optimizer, run.inner_steps, run.clip) == ("one-step", "muon", 1, None)
        assert (run.outer_rate, run.anneal, run.learn_rates, run.selected_after) == (0.01, True, True, 1)
    assert (twenty.steps, twenty.tasks, twenty.inner_rate, twenty.head_rates) == (14_000, 2, 0.4, (10.0,))
    assert (five.steps, five.tasks, five.inner_rate, five.head_rates) == (14_000, 2, 0.1, (2.5,))
    assert twenty.train_shape == five.train_shape == (40, 1, 1, "random", "ways")
    assert twenty.shape[:3] == (20, 1, 1) and five.shape[:3] == (5, 5, 5)
    assert (mini.steps, mini.tasks, mini.inner_rate, mini.head_rates) == (11_000, 1, 0.05, (0.1,))
    assert mini.shape[:3] == (5, 1, 15) and mini.train_shape[:3] == (20, 1, 3)
    assert (mini.downscale, mini.flips) == (2, True) and (twenty.downscale, twenty.flips) == (1, False)


def test_the_fast_recipe_starts_from_one_step_maml_with_one_shot(tmp_path):
    given = {"ways": 20, "shots": 5, "seed": 3, "split": "vinyals", "order": 1, "workdir": tmp_path, "first_steps": 70}
    run = omniglot.Run(recipe="fast", **given).resolved()
    assert (run.method, run.inner_steps, run.head_rates, run.tasks) == ("zero-head", 2, (10.0, 10.0), 2)
    assert (
        run.first_phase
        == omniglot.Run(
            recipe="one-step",
            ways=20,
            shots=1,
            seed=3,
            split="vinyals",
            order=1,
            workdir=tmp_path / "first-phase",
            steps=70,
        ).resolved()
    )
    assert miniimagenet.Run(recipe="fast", size=64).resolved().first_phase.size == 64
    assert [omniglot.Run(recipe="fast", ways=5, shots=k).resolved().tasks for k in (1, 5)] == [8, 4]
    assert omniglot.Run().resolved().first_phase is None
    assert omniglot.Run(recipe="fast", start_from=tmp_path / "model").resolved().first_phase is None


def test_given_options_replace_those_of_the_recipe():
    given = {
        "optimizer": "adam", "outer_rate": 0.02, "anneal": False, "learn_rates": False, "head_rates": (3.0,),
        "inner_rate": 0.7, "train_ways": 30, "train_shots": 2, "train_queries": 6, "tasks": 3, "steps": 7,
        "downscale": 3, "flips": False, "queries": 4, "clip": 0.5, "method": "one-step", "inner_steps": 1,
    }  # fmt: skip
    run = miniimagenet.Run(recipe="one-step", **given).resolved()
    assert {name: getattr(run, name) for name in given} == given


def test_tasks_in_training_are_those_of_the_test_unless_given():
    run = omniglot.Run(ways=7, shots=2, queries=3).resolved()
    assert run.train_shape == run.shape
    assert omniglot.Run(train_shots=2, train_queries=3).resolved().train_shape[:3] == (5, 2, 3)


def test_muon_has_no_clip_of_the_recipe():
    assert miniimagenet.Run(optimizer="muon").resolved().clip is None
    assert miniimagenet.Run(optimizer="muon", clip=0.5).resolved().clip == 0.5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"recipe": "fast", "method": "maml"}, "recipe 'fast' is for the method zero-head, but got maml"),
        ({"recipe": "one-step", "method": "maml"}, "recipe 'one-step' is for the method one-step, but got maml"),
        ({"recipe": "slow"}, "recipe must be one of 'paper', 'fast', 'one-step', but got 'slow'"),
        ({"first_steps": 20}, "first_steps is for the recipe 'fast' without start_from, but got 20 with .* 'paper'"),
        ({"recipe": "fast", "first_steps": 20, "start_from": Path("a")}, "with the recipe 'fast' and start_from"),
        ({"recipe": "fast", "first_steps": 0}, "first_steps must be an integer of at least 1, but got 0"),
        ({"recipe": "fast", "normalisation": "support"}, "In the first phase of the recipe 'fast', normalisation"),
        ({"method": "one-step", "inner_steps": 2}, "inner_steps must be 1 for the method one-step, but got 2"),
        ({"method": "one-step", "normalisation": "support"}, "one-step exchanges the two"),
        ({"method": "one-step", "shots": 2, "queries": 3}, "multiple of train_shots .* but got 3 and 2"),
        ({"method": "one-step", "downscale": 3}, "must divide the size of the images, 28x28, but got 3"),
        ({"method": "one-step", "downscale": 2, "net": "mlp"}, "for the convolutional net, but got 2"),
        ({"method": "one-step", "downscale": 0}, "downscale must be an integer of at least 1, but got 0"),
        ({"method": "one-step", "train_ways": 1}, "train_ways must be an integer of at least 2, but got 1"),
        ({"downscale": 2}, "downscale is for the method one-step, but got 2 for maml"),
        ({"train_ways": 20}, "train_ways is for the method one-step, but got 20 for maml"),
        ({"method": "reptile", "train_shots": 2}, "train_shots cannot be given for reptile"),
        ({"method": "pretrained", "train_queries": 2}, "train_queries cannot be given for pretrained"),
        ({"head_rates": (1.0,)}, "head_rates is for the methods zero-head and one-step, but got .* for maml"),
        ({"learn_rates": True}, "learn_rates is for the methods zero-head and one-step, but got True for maml"),
        ({"method": "zero-head", "head_rates": (1.0, 2.0)}, "at most 1 rates, .* but got 1.0 2.0"),
        ({"method": "zero-head", "head_rates": (-1.0,)}, "head_rates must be positive and finite, but got -1"),
        ({"method": "reptile", "optimizer": "muon"}, "optimizer 'muon' cannot be given for reptile"),
        ({"optimizer": "sgd"}, "optimizer must be one of 'adam', 'muon', but got 'sgd'"),
        ({"train_shots": 12, "train_queries": 9}, r"train_shots \+ train_queries must be at most 20"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        omniglot.Run(**options).resolved()


def test_too_few_classes_for_the_tasks_in_training_are_refused(characters, tmp_path):
    run = small_run(tmp_path, method="one-step", train_ways=1101)
    with pytest.raises(ValueError, match="Tasks in training: ways must be at most the number of classes, 1100"):
        run.check_data(characters)
    counts = characters.train.counts[:39]
    few = characters._replace(train=ImageClasses(characters.train.images[: sum(counts)], counts))
    with pytest.raises(ValueError, match=r"In the first phase of the recipe 'fast': ways must be at most .* 39"):
        omniglot.Run(recipe="fast", ways=5).resolved().check_data(few)


@pytest.mark.parametrize(
    "method, inner_rate, inner_steps, outer_rate, clip",
    [
        ("maml", 0.05, 5, 1e-3, 10 / 75),
        ("maml++", 0.05, 5, 1e-3, 10 / 75),
        ("imaml", 0.05, 16, 1e-3, 10 / 75),
        ("one-step", 0.05, 1, 1e-3, 10 / 75),
        ("reptile", 0.05, 5, 0.5, None),
    ],
)
def test_methods_change_the_recipe(method, inner_rate, inner_steps, outer_rate, clip):
    run = miniimagenet.Run(method=method).resolved()
    assert (run.inner_rate, run.inner_steps, run.outer_rate) == (inner_rate, inner_steps, outer_rate)
    assert run.clip == (None if clip is None else pytest.approx(clip))
    assert omniglot.Run(method=method).resolved().inner_rate == (0.2 if method == "imaml" else 2.0)
    assert omniglot.Run(method=method, inner_steps=1, inner_rate=3.0).resolved().inner_steps == 1


def test_resolving_sets_every_option_of_the_recipe():
    for run in (omniglot.Run(), miniimagenet.Run(), omniglot.Run(method="pretrained")):
        empty = {name for name, value in dataclasses.asdict(run.resolved()).items() if value is None}
        allowed = {
            "workdir",
            "wandb",
            "cache_dir",
            "row",
            "task_batch_size",
            "preset",
            "expect",
            "start_from",
            "first_steps",
        }
        assert empty <= {*allowed, *(("clip",) if run.experiment == "omniglot" else ())}


def test_only_a_pretrained_net_without_a_given_rate_is_tuned():
    assert omniglot.Run(method="pretrained").resolved().tune is True
    assert omniglot.Run(method="pretrained", inner_rate=0.7).resolved().tune is False
    assert omniglot.Run().resolved().tune is False
    with pytest.raises(ValueError, match="tune is for the method pretrained, but got maml"):
        omniglot.Run(tune=True).resolved()


def test_selection_uses_the_inner_steps_of_the_test():
    def after(**options):
        return omniglot.Run(**options).resolved().selected_after

    assert after() == 3 and after(ways=20) == 5 and after(method="maml++", inner_steps=7) == 7
    assert after(method="reptile") == after(method="imaml") == miniimagenet.Run().resolved().selected_after == 10


@pytest.mark.parametrize("options, falls", [({}, False), ({"anneal": True}, True), ({"method": "maml++"}, True)])
def test_steps_may_change_on_resuming_unless_the_outer_rate_falls(options, falls):
    assert ("steps" in omniglot.Run(**options).mutable_fields) is not falls


def test_a_run_resumes_only_with_the_same_data_and_selection(characters, tmp_path, monkeypatch):
    run = small_run(tmp_path)
    RunDirectory(run.workdir, "run", run.record(characters)).close()
    run.check_workdir()
    run.check_data(characters)
    dataclasses.replace(run, row="omniglot-5w1s", evaluation="transductive", steps=7, test_tasks=5).check_data(
        characters
    )
    other = characters._replace(sha256=characters.sha256 | {"test": "1" * 64})
    with pytest.raises(OSError, match="data_sha256"):
        run.check_data(other)
    with pytest.raises(OSError, match="tasks was 32, is 8"):
        dataclasses.replace(run, tasks=8).check_workdir()
    monkeypatch.setattr(omniglot.Run, "published_steps", 4)
    with pytest.raises(OSError, match="selected_after was 3, is 4"):
        run.check_workdir()


def test_a_run_is_restored_from_its_description(characters, tmp_path):
    fast = {"recipe": "fast", "start_from": tmp_path / "last.msgpack"}
    for options in ({}, fast, {"method": "pretrained"}, {"method": "imaml", "ways": 20, "row": "omniglot-20w1s-imaml"}):
        run = omniglot.Run(**options).resolved()
        described = run.description(characters)
        assert not {*NEUTRAL} & described["config"].keys()
        in_file = json.loads(json.dumps(to_jsonable(described["config"])))
        for config in (described["config"], in_file):
            restored = omniglot.Run(**config)
            restored.check()
            assert restored == dataclasses.replace(run, row=None) and hash(restored)
