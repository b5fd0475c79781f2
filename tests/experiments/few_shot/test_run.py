"""The record of a run: recipes, derived values, and the fields that a resumed run must share."""

import dataclasses

import pytest
from helpers.few_shot import small_run

from experiments import miniimagenet, omniglot
from experiments.few_shot.run import NEUTRAL
from maml_jax.runs.directory import RunDirectory


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


@pytest.mark.parametrize(
    "method, inner_rate, inner_steps, outer_rate, clip",
    [
        ("maml", 0.05, 5, 1e-3, 10 / 75),
        ("maml++", 0.05, 5, 1e-3, 10 / 75),
        ("imaml", 0.05, 16, 1e-3, 10 / 75),
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
        allowed = {"workdir", "wandb", "cache_dir", "row", "task_batch_size", "preset", "expect"}
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


def test_a_run_is_restored_from_its_description(characters):
    for options in ({}, {"method": "pretrained"}, {"method": "imaml", "ways": 20, "row": "omniglot-20w1s-imaml"}):
        run = omniglot.Run(**options).resolved()
        described = run.description(characters)
        assert not {*NEUTRAL} & described["config"].keys()
        restored = omniglot.Run(**described["config"])
        restored.check()
        assert restored == dataclasses.replace(run, row=None)
