"""Tests of evaluation against values by hand: accuracy, divergence, ensembles, intervals, nearest neighbours."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maml_jax import evaluation
from maml_jax.evaluation import Protocol, Results
from maml_jax.losses import query_with_support
from maml_jax.runs.files import to_jsonable
from maml_jax.types import Task

PROTOCOL = Protocol("made up", "test", 7, "0" * 64, 2, 0, 2, 1, 2, "none", 1, 0.5, "layer", "transductive")


def predicting(probabilities, support_loss=((1.0, 0.5), (1.0, 2.0))):
    return lambda tasks: (jnp.log(jnp.asarray(probabilities)), jnp.asarray(support_loss))


LABELS = jnp.array([[0, 1], [0, 1]])
TASKS = Task((jnp.zeros((2, 2, 1)), LABELS), (jnp.zeros((2, 2, 1)), LABELS))
# [T, S + 1, Q, N]. Correct queries before and after the step: 1 and 2 in the first task, 2 and 1 (a NaN) in the second.
SURE = [[[[0.9, 0.1], [0.6, 0.4]], [[0.8, 0.2], [0.3, 0.7]]], [[[0.7, 0.3], [0.1, 0.9]], [[np.nan] * 2, [0.2, 0.8]]]]


def test_accuracy_and_divergence_are_counted():
    found = evaluation.evaluate([predicting(SURE)], lambda: [TASKS], PROTOCOL)
    np.testing.assert_array_equal(found.accuracy, [[0.5, 1.0], [1.0, 0.5]])
    np.testing.assert_array_equal(found.diverged, [[False, False], [False, True]])
    mean, half_width = found.interval()
    np.testing.assert_allclose(mean, [75, 75])
    np.testing.assert_allclose(half_width, 1.96 * 25 / np.sqrt(2))
    text = str(found)
    parts = ("made up", "test split (7 classes", "2 ways, 1 shots", "layer, transductive", "75.00 +-34.65", "50.0%")
    for part in parts:
        assert part in text
    with pytest.raises(ValueError, match="The protocol says 2 tasks, but 4 were given"):
        evaluation.evaluate([predicting(SURE)], lambda: [TASKS, TASKS], PROTOCOL)


def test_an_ensemble_averages_probabilities_not_votes():
    """Two models with probability 55% for the right class lose to a model with 99% for the wrong class."""
    right, wrong = np.full((2, 2, 2, 2), 0.5), np.full((2, 2, 2, 2), 0.5)
    for query in range(2):
        right[:, :, query] = [0.45, 0.45]
        right[:, :, query, query] = 0.55
        wrong[:, :, query] = [0.99, 0.99]
        wrong[:, :, query, query] = 0.01
    for members, expected in (([right], 1.0), ([right, right, wrong], 0.0), ([wrong, right], 0.0)):
        found = evaluation.evaluate([predicting(each) for each in members], lambda: [TASKS], PROTOCOL)
        assert (found.accuracy == expected).all()


def test_a_task_has_diverged_if_it_diverged_for_any_model():
    members = [predicting(SURE, loss) for loss in (((1, 2), (1, 0)), ((1, 0), (1, 0)), ((1, 0), (np.nan, 0)))]
    found = evaluation.evaluate(members, lambda: [TASKS], PROTOCOL)
    np.testing.assert_array_equal(found.diverged, [[False, True], [True, True]])


def test_the_interval_of_a_paired_difference_is_narrower_than_separate_intervals():
    random = np.random.default_rng(0)
    hardness = random.uniform(0.3, 0.9, 400)
    first, second = (
        Results(PROTOCOL._replace(tasks=400), (hardness + by)[:, None], np.zeros((400, 1), bool))
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


def test_results_are_restored_from_their_summary():
    random = np.random.default_rng(0)
    protocol = Protocol("made up", "test", 9, "0" * 64, 40, 0, 5, 1, 3, "none", 10, None, "batch", "transductive")
    whole = Results(protocol, random.integers(0, 16, (40, 11)) / 15, random.integers(0, 2, (40, 11)) == 1)
    text = json.dumps(to_jsonable(whole.summary()))
    back = evaluation.from_summary(json.loads(text))
    assert len(text) < 4000 and back.protocol == protocol
    np.testing.assert_array_equal(back.accuracy, whole.accuracy)
    np.testing.assert_array_equal(back.diverged, whole.diverged)
    cut = json.loads(text)
    cut["correct"] = [line[:10] for line in cut["correct"]]
    with pytest.raises(ValueError, match="says 40 tasks"):
        evaluation.from_summary(cut)
    del cut["correct"]
    with pytest.raises(ValueError, match="no results of single tasks"):
        evaluation.from_summary(cut)


def test_an_interval_with_a_task_that_diverged_is_nan_without_a_warning(recwarn):
    found = evaluation.interval([[1.0, 1.0], [3.0, np.inf]])
    np.testing.assert_array_equal(found.mean, [2, np.inf])
    np.testing.assert_allclose(found.half_width, [1.96 / np.sqrt(2), np.nan])
    assert not recwarn.list


@pytest.mark.parametrize("context", [False, True])
def test_the_nearest_neighbour_against_a_loop(context):
    """The labels are in random order. With `context`, the features of queries get the support set as an argument."""
    keys = jax.random.split(jax.random.key(0), 2)
    support, query = jax.random.normal(keys[0], (3, 8, 2)), jax.random.normal(keys[1], (3, 10, 2))
    labels = jax.random.permutation(keys[0], jnp.tile(jnp.arange(4), 2))[None].repeat(3, 0)
    tasks = Task((support, labels), (query, jnp.zeros((3, 10), jnp.int32)))
    seen = []

    def features(params, inputs, *context):
        seen.append([part.shape for part in (inputs, *context)])
        return params * inputs

    predict = evaluation.nearest_neighbour(features, jnp.array([1.0, 0.1]), 4)
    log_probabilities, support_loss = predict(query_with_support(tasks) if context else tasks)
    assert log_probabilities.shape == (3, 1, 10, 4) and support_loss.shape == (3, 1)
    assert seen == [[(8, 2)], [(10, 2), (8, 2)] if context else [(10, 2)]]
    scale = np.array([1.0, 0.1])
    for task in range(3):
        for number in range(10):
            distances = [np.sum((scale * (query[task, number] - one)) ** 2) for one in support[task]]
            expected = int(labels[task, int(np.argmin(distances))])
            assert np.exp(log_probabilities[task, 0, number]).tolist() == [float(i == expected) for i in range(4)]


def test_infinite_and_nan_losses_are_diverged():
    support_loss = [[1.0, 0.5, 2.0], [np.inf, np.inf, 1.0], [1.0, np.nan, np.inf]]
    np.testing.assert_allclose(evaluation.divergence_rate(support_loss), [1 / 3, 2 / 3, 2 / 3])
