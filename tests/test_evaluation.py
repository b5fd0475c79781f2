"""Evaluation against what a hand count gives; saved models; every method on real characters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import classifier, methods
from experiments.few_shot import DataSet, Prepared, Setting
from experiments.omniglot import Config
from maml_jax import evaluation, models, saved
from maml_jax.evaluation import Protocol
from maml_jax.tasks import episodes, omniglot
from maml_jax.train import many_steps
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


def test_saved_and_loaded_is_the_same(tmp_path):
    params = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(2, jnp.bfloat16)}
    rates = {"a": {"kernel": [jnp.eye(2), jnp.eye(3)]}}
    path = saved.save(tmp_path / "deep" / "model.msgpack", params, rates, {"way": 5, "list": [1, 2]})
    content = saved.load(path)
    assert content.description == {"way": 5, "list": [1, 2]} and content.params["b"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, content.params, params)
    np.testing.assert_array_equal(content.rates["a"]["kernel"]["1"], np.eye(3))
    assert saved.load(saved.save(path, params)).rates == () and list(path.parent.iterdir()) == [path]
    whole = path.read_bytes()
    for damage in (whole[:100], whole.replace(b"maml_jax 1", b"maml_jax 9"), b"", b"\x80\x04K\x01.", b"{}"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"model\.msgpack is not a file of maml_jax\.saved\.save, or damaged"):
            saved.load(path)


@pytest.fixture(scope="module")
def characters(shared_data, omniglot_cache):
    data = omniglot.load(shared_data / "omniglot", omniglot_cache)
    parts = [episodes.equal_classes(255 - data.images[part]) for part in omniglot.split("paper", data.names)]
    return DataSet("Omniglot", *parts, dict.fromkeys(("train", "val", "test"), "0" * 64), "none", {})


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_gets_better_on_real_characters(method, characters, monkeypatch):
    """A small net, a few meta-steps: beats where it started by more than three standard errors."""
    monkeypatch.setattr(classifier, "network", lambda s, kind, image, out: models.MLP((64, 32), out, kind))
    inner_steps, rate = methods.inner_steps_of(method, 1), 0.2 if method == "imaml" else 1.0
    setting = Setting(5, 1, 5, "mlp", 8, rate, inner_steps, None)
    steps = 200 if method in ("pretrained", "reptile", "anil") else 60
    config = Config(method=method, steps=steps, outer_rate=5e-3)
    prepared = Prepared("omniglot", config, setting, characters, None, 1, 100)
    model = classifier.classifier(config, setting, (28, 28, 1), len(characters.train.counts))
    learner = model.method.learner()
    state = learner.init(model.method.start(model.trained.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]))
    tasks = classifier.fixed_tasks(jax.random.key(1), characters.test, 200, prepared.shape)

    def accuracy(state):
        finished = state._replace(params=model.method.finish(state.params))
        told = classifier.protocol(prepared, "test", 200, 1)
        found = classifier.evaluate(prepared, [(model, finished)], tasks, told, steps=inner_steps)
        return found.accuracy[:, -1]

    draw, data = classifier.drawn_from(prepared, jax.random.key(2))
    train = jax.jit(many_steps(learner, draw))
    after, metrics = train(state, data, steps)
    assert np.isfinite(metrics["loss"])
    better = accuracy(after) - accuracy(state)
    assert better.mean() > 3 * better.std() / np.sqrt(200), (better.mean(), better.std())
