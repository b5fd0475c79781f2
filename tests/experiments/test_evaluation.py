"""Evaluation against what a hand count gives; saved models; every method on real characters."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments.few_shot.options import DataSet, Prepared, Setting

from experiments import evaluate
from experiments import omniglot as omniglot_experiment
from experiments.few_shot import classifier, methods, training
from experiments.few_shot import options as few_shot
from experiments.omniglot import Config
from experiments.shared import plots
from maml_jax import evaluation, statistics
from maml_jax.evaluation import Protocol
from maml_jax.inner import inner_loop
from maml_jax.nets import models
from maml_jax.runs import directory, model_file
from maml_jax.runs.files import to_jsonable
from maml_jax.tasks import episodes, host_memory, omniglot
from maml_jax.training import many_steps
from maml_jax.types import Task

PROTOCOL = Protocol("made up", "test", 7, "0" * 64, 2, 0, 2, 1, 2, "none", 1, 0.5, "layer", "together")


def predicting(probabilities, support_loss=((1.0, 0.5), (1.0, 2.0))):
    return lambda tasks: (jnp.log(jnp.asarray(probabilities)), jnp.asarray(support_loss))


LABELS = jnp.array([[0, 1], [0, 1]])
TASKS = Task((jnp.zeros((2, 2, 1)), LABELS), (jnp.zeros((2, 2, 1)), LABELS))
# [T, S + 1, Q, N]: right and wrong; both right. Then right and right; not a number and right.
SURE = [[[[0.9, 0.1], [0.6, 0.4]], [[0.8, 0.2], [0.3, 0.7]]], [[[0.7, 0.3], [0.1, 0.9]], [[np.nan] * 2, [0.2, 0.8]]]]


def test_accuracy_is_counted_and_divergence_told():
    found = evaluation.evaluate([predicting(SURE)], lambda: [TASKS], PROTOCOL)
    np.testing.assert_array_equal(found.accuracy, [[0.5, 1.0], [1.0, 0.5]])
    np.testing.assert_array_equal(found.diverged, [[False, False], [False, True]])
    mean, half_width = found.interval()
    np.testing.assert_allclose(mean, [75, 75])
    np.testing.assert_allclose(half_width, 1.96 * 25 / np.sqrt(2))
    text = str(found)
    for part in (
        "made up",
        "test split (7 classes",
        "2 ways, 1 shots",
        "layer, queries together",
        "75.00 +-34.65",
        "50.0%",
    ):
        assert part in text
    with pytest.raises(ValueError, match="The protocol says 2 tasks, but 4 were given"):
        evaluation.evaluate([predicting(SURE)], lambda: [TASKS, TASKS], PROTOCOL)


def test_an_ensemble_averages_probabilities_not_votes():
    """Two that lean to the right class a little lose to one that is sure of the wrong one."""
    right, wrong = np.full((2, 2, 2, 2), 0.5), np.full((2, 2, 2, 2), 0.5)
    for query in range(2):
        right[:, :, query] = [0.45, 0.45]
        right[:, :, query, query] = 0.55
        wrong[:, :, query] = [0.99, 0.99]
        wrong[:, :, query, query] = 0.01
    for members, expected in (([right], 1.0), ([right, right, wrong], 0.0), ([wrong, right], 0.0)):
        found = evaluation.evaluate([predicting(each) for each in members], lambda: [TASKS], PROTOCOL)
        assert (found.accuracy == expected).all()


def test_a_paired_difference_is_narrower_than_its_parts():
    random = np.random.default_rng(0)
    hardness = random.uniform(0.3, 0.9, 400)
    first, second = (
        evaluation.Results(PROTOCOL._replace(tasks=400), (hardness + by)[:, None], np.zeros((400, 1), bool))
        for by in (random.normal(0.02, 0.02, 400), random.normal(0, 0.02, 400))
    )
    found = evaluation.difference(first, second, steps=(0, 0))
    assert found.low < 2 < found.high and found.low > 1
    exact = 1.96 * 100 * (first.accuracy - second.accuracy).std() / 20
    np.testing.assert_allclose((found.high - found.low) / 2, exact, rtol=0.1)
    assert exact < first.interval().half_width[0] / 5
    other = second._replace(protocol=second.protocol._replace(seed=1))
    with pytest.raises(ValueError, match="needs the same tasks on both sides"):
        evaluation.difference(first, other, steps=(0, 0))


@pytest.fixture(scope="module")
def characters(shared_data, omniglot_cache):
    data = omniglot.load(shared_data / "omniglot", omniglot_cache)
    parts = [episodes.equal_classes(255 - data.images[part]) for part in omniglot.split("paper", data.names)]
    return DataSet("Omniglot", *parts, dict.fromkeys(("train", "val", "test"), "0" * 64), "none", {})


@pytest.mark.parametrize(
    "method, order, normalisation",
    [*((method, 2, "batch") for method in methods.METHODS), ("maml", 1, "batch"), ("maml", 2, "running")],
)
def test_every_method_gets_better_on_real_characters(method, order, normalisation, characters, monkeypatch):
    """A small net, a few meta-steps: beats where it started by more than three standard errors."""
    monkeypatch.setattr(classifier, "network", lambda s, kind, image, out: models.MLP((64, 32), out, kind))
    inner_steps, rate = methods.inner_steps_of(method, 1), methods.inner_rate_of(method, 1.0)
    outer_rate = 0.5 if method == "reptile" else 5e-3
    setting = Setting(5, 1, 5, "mlp", 8, rate, inner_steps, outer_rate, None)
    steps = 200 if method in ("pretrained", "reptile", "anil") else 60
    config = Config(method=method, order=order, normalisation=normalisation, steps=steps)
    prepared = Prepared("omniglot", config, setting, characters, None, 1, 100)
    model = classifier.classifier(config, setting, (28, 28, 1), len(characters.train.counts))
    learner = model.method.learner()
    state = learner.init(model.method.start(model.trained.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]))
    tasks = classifier.fixed_tasks(jax.random.key(1), characters.test, 200, prepared.shape)
    train_tasks = classifier.fixed_tasks(jax.random.key(3), characters.train, 50, prepared.shape)

    def accuracy(state):
        finished = model.finished(state, train_tasks, inner_steps)
        told = classifier.protocol(prepared, "test", 200, 1)
        found = classifier.evaluate(prepared, [(model, finished)], tasks, told, steps=inner_steps)
        # Validation, which predicts nothing before the last step, finds the same.
        assert model.accuracy(finished, tasks(), inner_steps) == pytest.approx(found.accuracy[:, -1].mean(), abs=1e-3)
        return found.accuracy[:, -1]

    draw, data = classifier.drawn_from(prepared, jax.random.key(2))
    train = jax.jit(many_steps(learner, draw))
    after, metrics = train(state, data, steps)
    assert np.isfinite(metrics["loss"])
    assert np.abs(after.params["Norm_0"]["offset"]).max() > 0  # All of the net is meta-learned.
    better = accuracy(after) - accuracy(state)
    assert better.mean() > 3 * better.std() / np.sqrt(200), (better.mean(), better.std())


def prepared_with(characters, tmp_path, **options):
    """A setting with the small net, its classifier and an initial state."""
    config = Config(workdir=tmp_path / "run", **options)
    _, setting = omniglot_experiment.settle(config)
    prepared = Prepared("omniglot", config, setting, characters, None, 1, 20)
    model = classifier.classifier(config, setting, (28, 28, 1), len(characters.train.counts))
    params = model.trained.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    return prepared, model, model.method.learner().init(model.method.start(params))


@pytest.fixture
def small_net(monkeypatch):
    monkeypatch.setattr(classifier, "network", lambda s, kind, image, out: models.MLP((16, 8), out, kind))


def test_the_best_models_are_kept_by_validation(characters, tmp_path, small_net):
    prepared, _, state = prepared_with(characters, tmp_path)
    best = training.Best(tmp_path / "best", few_shot.describe(prepared))
    accuracies = [0.1, 0.5, 0.3, 0.5, 0.2, 0.4, 0.05, 0.6]
    for step, accuracy in enumerate(accuracies[:5], 1):
        best.add(state._replace(step=jnp.int32(step)), accuracy)
    # As after a restart, with what is there already made once more.
    best = training.Best(tmp_path / "best", few_shot.describe(prepared))
    for step, accuracy in enumerate(accuracies[4:], 5):
        best.add(state._replace(step=jnp.int32(step)), accuracy)
    assert [int(path.stem[5:]) for path in best.paths()] == [8, 4, 2, 6, 3]
    assert sorted(best.paths()) == sorted((tmp_path / "best").iterdir())
    assert [int(candidate.step) for candidate in best.states(state)] == [8, 4, 2, 6, 3]


def test_models_are_selected_by_what_is_reported(characters, tmp_path, small_net, monkeypatch):
    """Not after as many inner steps as training takes; and --seen together leaves the queries one by one out."""
    asked, whole = [], classifier.Classifier.accuracy

    def accuracy(model, state, groups, steps):
        asked.append((steps, whole(model, state, groups, steps)))
        return asked[-1][1]

    monkeypatch.setattr(classifier.Classifier, "accuracy", accuracy)
    prepared, _, _ = prepared_with(characters, tmp_path, steps=40, tasks=4, test_tasks=5, seen="together")
    results = training.main(prepared._replace(published_steps=3))
    assert prepared.setting.inner_steps == 1 and [steps for steps, _ in asked] == [3, 3]
    assert results["selected"]["by"] == "accuracy on validation tasks after 3 inner steps"
    assert results["selected"]["step"] == (40 if asked[1][1] >= asked[0][1] else 20)
    assert list(results["test"]) == ["queries together"]
    (best,) = [path for path in (tmp_path / "run" / "best").iterdir() if str(results["selected"]["step"]) in path.name]
    assert model_file.load(best).description["selected_after"] == 3


def test_the_best_models_are_evaluated_together_where_asked(characters, tmp_path, small_net, capsys):
    prepared, model, state = prepared_with(characters, tmp_path, steps=60, tasks=4, test_tasks=6, ensemble=True)
    found = training.main(prepared)["test"]
    assert list(found) == ["queries together", "queries one by one", "ensemble"]
    assert [each["protocol"]["models"] for each in found.values()] == [1, 1, 3]
    test_key = jax.random.split(jax.random.key(prepared.config.seed), 4)[3]
    (tasks,) = classifier.fixed_tasks(test_key, prepared.data.test, 6, prepared.shape)()
    best = training.Best(tmp_path / "run" / "best", {})
    each = [np.exp(model.predictor(one, few_shot.TEST_STEPS)(tasks)[0]) for one in best.states(state)]
    together = evaluation.predicted(np.mean(each, 0)) == np.asarray(tasks.query[1])[:, None]
    np.testing.assert_allclose(found["ensemble"]["accuracy"], 100 * together.mean((0, 2)), atol=1e-4)
    assert (found["ensemble"]["accuracy"] != found["queries together"]["accuracy"]).any()


def test_a_run_selected_after_other_inner_steps_does_not_go_on(characters, tmp_path, small_net):
    prepared, _, _ = prepared_with(characters, tmp_path)
    directory.RunDirectory(prepared.config.workdir, "run", few_shot.recorded_with_data(prepared)).close()
    few_shot.check_workdir(prepared.config, prepared.setting)
    with pytest.raises(OSError, match="selected_after was 1, is 3"):
        few_shot.check_data(prepared._replace(published_steps=3))


def test_joint_training_draws_the_same_from_host_memory(characters, tmp_path, small_net, monkeypatch):
    prepared, _, _ = prepared_with(characters, tmp_path, method="pretrained", tasks=2)
    draw, data = classifier.drawn_from(prepared, jax.random.key(3))
    on_device = jax.jit(draw)(data, 7)
    monkeypatch.setattr(host_memory, "fits_on_device", lambda size: False)
    draw, choose = classifier.drawn_from(prepared, jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, on_device, jax.jit(draw)(choose(7, 1), 7))
    numbers = np.asarray(on_device.support[1])
    assert numbers.shape == (2, 64) and all(len(set(row)) == 64 for row in numbers) and numbers.max() > 500


def test_methods_count_after_the_steps_that_they_are_tested_with():
    assert few_shot.reported_steps("maml", 3, 1) == 3 and few_shot.reported_steps("maml++", 3, 7) == 7
    assert few_shot.reported_steps("reptile", 3, 5) == 10


@pytest.mark.parametrize(
    "method, anneal, falls", [("maml", False, False), ("maml", True, True), ("maml++", False, True)]
)
def test_the_outer_rate_falls_where_it_is_asked_for(method, anneal, falls):
    """Along a cosine over all meta-steps, to a hundredth: by how much Adam moves under a gradient that stays the same.

    A run of another number of meta-steps is then another run.
    """
    steps = 10
    training = methods.Training(method, 2, 0.4, 1, 1e-2, None, steps, anneal)
    outer = methods._outer(training)
    weight, moved = jnp.float32(0), []
    state = outer.init(weight)
    for _ in range(steps + 1):
        update, state = outer.update(jnp.float32(3.0), state, weight)
        moved.append(-float(update))
    cosine = 0.01 + 0.99 * (1 + np.cos(np.pi * np.arange(steps + 1) / steps)) / 2
    np.testing.assert_allclose(moved, 1e-2 * cosine if falls else np.full(steps + 1, 1e-2), rtol=1e-4)
    # A run that is older than the option goes on where it is not taken.
    assert ("anneal" in few_shot.recorded(omniglot_experiment.Config(anneal=anneal), Setting(*range(9)))) is anneal
    assert ("steps" in few_shot.mutable_fields(omniglot_experiment.Config(method=method, anneal=anneal))) is not falls


@pytest.mark.parametrize("method", ["maml++", "meta-curvature"])
def test_a_saved_model_is_what_was_trained(method, characters, tmp_path, small_net, monkeypatch):
    """With its rates, in the structure that they had; and what does not fit is refused before anything is evaluated."""
    prepared, _, state = prepared_with(characters, tmp_path, method=method)
    state = jax.tree.map(lambda leaf: leaf + 0.01 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, state)
    description = few_shot.describe(prepared) | {"selected_after": 4}
    training.Best(tmp_path, description).add(state._replace(step=jnp.int32(7)), 0.5)
    monkeypatch.setattr(omniglot_experiment, "prepare", lambda config: prepared._replace(config=config))
    path = tmp_path / "step-0000007.msgpack"
    loaded = evaluate.load(path, evaluate.Config((path,)), {})
    assert loaded.state.step == 7 and loaded.selected_after == 4
    jax.tree.map(np.testing.assert_array_equal, loaded.state[1:3], state[1:3])
    for options, message in (
        ({"inner_rate": 0.1}, "its rates are learned"),
        ({"normalisation": "tasknorm"}, "normalisation cannot be 'tasknorm'"),
        ({"normalisation": "running"}, "normalisation cannot be 'running'"),
        ({"output": tmp_path / "nowhere" / "out.json"}, "output must be in a directory that exists"),
        ({"output": tmp_path / "out.png"}, "output must be a file for JSON"),
        ({"models": ()}, "at least one file"),
        ({"compare_step": 11}, "compare_step must be from 0 to steps, 10, but got 11"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.prepare(evaluate.Config(**{"models": (path,), **options}))
    other = characters._replace(sha256=dict.fromkeys(characters.sha256, "1" * 64))
    monkeypatch.setattr(omniglot_experiment, "prepare", lambda config: prepared._replace(config=config, data=other))
    with pytest.raises(ValueError, match="is not the data set that"):
        evaluate.prepare(evaluate.Config((path,)))
    evaluate.prepare(evaluate.Config((path,), other_data=True))
    (tmp_path / "no.msgpack").write_text("{}")
    with pytest.raises(ValueError, match=r"no\.msgpack is not a file of maml_jax\.save"):
        evaluate.prepare(evaluate.Config((tmp_path / "no.msgpack",)))


def test_a_run_goes_on_with_its_own_data_alone(characters, tmp_path, small_net):
    prepared, _, _ = prepared_with(characters, tmp_path)
    directory.RunDirectory(prepared.config.workdir, "run", few_shot.recorded_with_data(prepared)).close()
    few_shot.check_workdir(prepared.config, prepared.setting)
    few_shot.check_data(prepared)
    other = prepared._replace(data=characters._replace(sha256=characters.sha256 | {"test": "1" * 64}))
    with pytest.raises(OSError, match="data_sha256"):
        few_shot.check_data(other)


def test_fine_tuning_takes_the_rate_that_is_best_in_validation(characters, tmp_path, small_net, monkeypatch):
    prepared, model, state = prepared_with(characters, tmp_path, method="pretrained")
    state = state._replace(params=model.method.finish(state.params))
    tasks = classifier.fixed_tasks(jax.random.key(0), characters.val, 20, prepared.shape)
    seen = []

    def accuracy(model, state, groups, steps):
        assert len(list(groups)) == len(list(tasks())) and steps == prepared.reported_steps
        # The rate is that which the model adapts with.
        adapted, _ = inner_loop(model.method.inner, quadratic, {"x": jnp.array(1.0)}, (), None, steps=1)
        seen.append(1 - float(adapted["x"]))
        return -abs(seen[-1] - 0.2)

    def quadratic(params, batch):
        return params["x"] ** 2 / 2, {}

    monkeypatch.setattr(classifier.Classifier, "accuracy", accuracy)
    best, _ = training.tuned(prepared, state, tasks)
    np.testing.assert_allclose(seen, np.multiply(training.FACTORS, prepared.setting.inner_rate), rtol=1e-5)
    assert best.setting.inner_rate == pytest.approx(0.2)
    given = prepared._replace(
        config=dataclasses.replace(prepared.config, inner_rate=0.7),
        setting=dataclasses.replace(prepared.setting, inner_rate=0.7),
    )
    assert training.tuned(given, state, tasks)[0].setting.inner_rate == 0.7


def test_a_pretrained_model_is_evaluated_again_as_it_was(characters, tmp_path, small_net, monkeypatch):
    """Fine-tuned at the rate that its training found."""
    monkeypatch.setattr(training, "FACTORS", (0.03, 0.1))
    options = {"steps": 20, "tasks": 2, "test_tasks": 6, "seen": "together"}
    prepared, _, _ = prepared_with(characters, tmp_path, method="pretrained", **options)
    found = training.main(prepared)
    (path,) = (tmp_path / "run" / "best").iterdir()

    def prepare(config):
        return prepared._replace(config=config, setting=omniglot_experiment.settle(config)[1])

    # A run that was stopped before its first validation, and is to end there, is evaluated, too.
    path.unlink()
    assert to_jsonable(training.main(prepared)["test"]) == to_jsonable(found["test"])
    monkeypatch.setattr(omniglot_experiment, "prepare", prepare)
    again = evaluate.main(evaluate.prepare(evaluate.Config((path,), tasks=6)))
    assert to_jsonable(again[f"{path}, queries together"]) == to_jsonable(found["test"]["queries together"])
    protocol = found["test"]["nearest neighbour"]["protocol"]
    assert protocol["method"] == "nearest neighbour in the features of pretrained" and protocol["inner_steps"] == 0
    old = model_file.load(path).description
    assert old["config"]["inner_rate"] == found["setting"]["inner_rate"]
    old["config"]["inner_steps"] = 7  # Which could once be given.
    assert omniglot_experiment.settle(Config(**few_shot.options_of(old)))[1].inner_rate == old["config"]["inner_rate"]


def test_the_rates_that_are_told_are_those_of_the_step(characters, tmp_path, small_net, monkeypatch):
    """Where a loss stops being finite: the outer rate may have fallen by then."""
    told = []

    def stopped(*_, rates, **options):
        told.append(rates["outer"])
        raise InterruptedError

    monkeypatch.setattr(training, "resumable_train", stopped)
    for number, options in enumerate(({}, {"anneal": True}, {"method": "reptile"})):
        prepared, _, _ = prepared_with(characters, tmp_path / str(number), steps=100, **options)
        with pytest.raises(InterruptedError):
            training.main(prepared)
    constant, annealed, reptile = told
    assert constant == 1e-3 and annealed(0) == pytest.approx(1e-3) and annealed(100) == pytest.approx(1e-5)
    assert reptile(0) == 0.5 and reptile(50) == 0.25


def test_two_models_are_compared_on_the_same_tasks(characters, tmp_path, small_net, monkeypatch):
    prepared, _, state = prepared_with(characters, tmp_path)
    best = training.Best(tmp_path / "best", few_shot.describe(prepared))
    for step, accuracy, scale in ((1, 0.4, 1.0), (2, 0.6, -3.0)):
        params = jax.tree.map(lambda leaf, scale=scale: leaf * scale, state.params)
        best.add(state._replace(step=jnp.int32(step), params=params), accuracy)
    second, first = best.paths()
    monkeypatch.setattr(omniglot_experiment, "prepare", lambda config: prepared._replace(config=config))
    output = tmp_path / "found.json"
    rows = evaluate.main(
        evaluate.prepare(
            evaluate.Config((first, second), tasks=12, steps=2, compare_step=1, seen="both", output=output)
        )
    )
    assert [*rows] == [f"{path}, queries {seen}" for path in (first, second) for seen in ("together", "one by one")]
    for seen in ("together", "one by one"):
        of_first, of_second = (rows[f"{path}, queries {seen}"] for path in (first, second))
        assert "first_minus_this" not in of_first
        difference = of_second["first_minus_this"]
        assert difference["inner_steps"] == 1 and difference["low"] <= difference["mean"] <= difference["high"]
        assert difference["mean"] == pytest.approx(of_first["accuracy"][1] - of_second["accuracy"][1])
        # Alone, a query normalised by the batch is nothing to either.
        assert (of_first["accuracy"][1] != of_second["accuracy"][1]) == (seen == "together")
    made_by = json.loads(output.read_text())["made_by"]
    assert made_by["started"] <= made_by["finished"] and made_by["versions"]["mujoco"]


def test_a_run_without_validations_has_a_picture(tmp_path):
    results = {"test": {"queries together": {"accuracy": [20.0, 30.0], "half_width": [1.0, 1.0]}}, "published": None}
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots.plt, "close", drawn.append)
        for validated in ({}, {"val_accuracy": 0.5}):
            plots.few_shot(tmp_path / "curves.png", [{"step": 20, "accuracy": 0.4, **validated}], results)
    for figure, lines in zip(drawn, (1, 2)):
        left = figure.axes[0]
        assert len(left.lines) == lines and all("o-" not in label.get_text() for label in left.get_yticklabels())
        plots.plt.close(figure)


def test_models_that_learn_otherwise_are_no_ensemble(characters, tmp_path, small_net, monkeypatch):
    paths = []
    for order in (1, 2):
        prepared, _, state = prepared_with(characters, tmp_path, order=order)
        training.Best(tmp_path / str(order), few_shot.describe(prepared)).add(state, 0.5)
        paths += (tmp_path / str(order)).iterdir()
    monkeypatch.setattr(omniglot_experiment, "prepare", lambda config: prepared._replace(config=config))
    evaluate.prepare(evaluate.Config(tuple(paths)))
    with pytest.raises(ValueError, match=r"(?s)learn a task in the same way.*order 1.*order 2"):
        evaluate.prepare(evaluate.Config(tuple(paths), ensemble=True))
    with pytest.raises(ValueError, match="is a folder"):
        evaluate.prepare(evaluate.Config((tmp_path / "1",)))
    with pytest.raises(ValueError, match="models must"):
        evaluate.prepare(evaluate.Config((paths[0], paths[0])))


def test_an_interval_with_a_task_that_diverged_is_no_number_and_no_warning(recwarn):
    found = statistics.interval([[1.0, 1.0], [3.0, np.inf]])
    np.testing.assert_array_equal(found.mean, [2, np.inf])
    np.testing.assert_allclose(found.half_width, [1.96 / np.sqrt(2), np.nan])
    assert not recwarn.list
