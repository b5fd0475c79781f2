"""Tests of losses: values, inner rates, and inductive predictions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.model_zoo import drawn_params

from maml_jax import losses
from maml_jax.nets import models
from maml_jax.nets.normalisation import NORMALISATIONS


def test_rate_for_mean_loss_gives_the_update_of_the_paper():
    """In the paper's code the loss is the sum over N * K examples, divided by K. The inner rate is 0.4."""
    ways, shots, rate = 5, 2, 0.4
    logits = jax.random.normal(jax.random.key(0), (ways * shots, ways))
    labels = jnp.arange(ways).repeat(shots)
    mean = losses.cross_entropy(lambda params, x: x + params)
    ours = jax.grad(lambda p: mean(p, (logits, labels))[0])(jnp.zeros(ways))
    one_hot = jax.nn.one_hot(labels, ways)
    paper = jax.grad(lambda p: -jnp.sum(one_hot * jax.nn.log_softmax(logits + p)) / shots)(jnp.zeros(ways))
    np.testing.assert_allclose(losses.rate_for_mean_loss(rate, ways) * ours, rate * paper, rtol=1e-5, atol=1e-6)


def test_values_of_losses():
    batch = (jnp.array([[1.0], [2.0]]), jnp.array([[2.0], [5.0]]))
    loss, aux = losses.mean_squared_error(lambda params, x: params * x)(1.0, batch)
    assert loss == 5.0 and aux == {}
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    loss, aux = losses.cross_entropy(lambda params, x: x)(None, (logits, jnp.array([0, 0])))
    np.testing.assert_allclose(loss, -np.log([0.5, 0.1]).mean(), rtol=1e-6)
    assert aux["accuracy"] == 0.5


def test_inductive_predictions_do_not_depend_on_each_other():
    def centred(params, inputs, context=None):
        return inputs - (inputs if context is None else context).mean(0) + params

    inputs, context = jnp.array([[0.0], [2.0]]), jnp.array([[3.0]])
    np.testing.assert_array_equal(centred(1.0, inputs), [[0.0], [2.0]])
    np.testing.assert_array_equal(losses.inductive(centred)(1.0, inputs), [[1.0], [1.0]])
    np.testing.assert_array_equal(losses.inductive(centred)(1.0, inputs, context), [[-2.0], [0.0]])


def test_weights_of_examples():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6]]))
    labels, weights = jnp.array([0, 0, 2]), jnp.array([3.0, 0.0, 1.0])
    for make, value in ((losses.cross_entropy, 1.0), (losses.log_probabilities, None)):
        loss, aux = make(lambda params, x: x)(None, (logits, labels, weights))
        np.testing.assert_allclose(loss, -(3 * np.log(0.5) + np.log(0.6)) / 4, rtol=1e-6)
        assert value is None or aux["accuracy"] == value  # The wrong example has the weight 0.
    batch = (jnp.array([[1.0], [2.0]]), jnp.array([[2.0], [5.0]]), jnp.array([1.0, 0.0]))
    assert losses.mean_squared_error(lambda params, x: x)(None, batch)[0] == 1.0


def test_a_batch_of_another_form_raises():
    inputs, labels = jnp.zeros((4, 3)), jnp.zeros(4, jnp.int32)
    loss_fn = losses.cross_entropy(lambda params, x: x)
    with pytest.raises(ValueError, match=r"weights must be one for each example, of shape \(4,\), but have \(3,\)"):
        loss_fn(None, (inputs, labels, jnp.ones(3)))
    for batch in ((inputs,), (inputs, labels, labels, labels), {"inputs": inputs, "labels": labels}):
        with pytest.raises(TypeError, match=r"The batch must be \(inputs, targets\), .* but is a"):
            loss_fn(None, batch)


def test_a_query_set_may_bring_its_support_set():
    task = losses.query_with_support(losses.Task((jnp.array([[5.0]]), jnp.array([[0.0]])), (jnp.ones((1, 1)),) * 2))
    loss, _ = losses.mean_squared_error(lambda params, x, context: x + context)(None, task.query)
    assert loss == 25.0


def test_labels_that_are_no_class_give_nan_unless_their_weight_is_zero():
    logits = jnp.zeros((3, 5))
    loss_fn = losses.cross_entropy(lambda params, x: x * params)
    for labels in (jnp.array([0, -1, 1]), np.array([0, 5, 1], np.int8)):
        assert jnp.isnan(loss_fn(1.0, (logits, labels))[0])
        weighted = jax.value_and_grad(lambda params, labels=labels: loss_fn(params, (logits, labels, WEIGHTS))[0])
        value, slope = weighted(1.0)
        np.testing.assert_allclose(value, np.log(5), rtol=1e-6)
        assert jnp.isfinite(slope)


WEIGHTS = jnp.array([1, 0, 1])  # Integers: their type is converted.


def test_a_single_example_raises():
    apply = lambda params, x: x  # noqa: E731
    with pytest.raises(ValueError, match="leading axis of tasks"):
        losses.cross_entropy(apply)(None, (jnp.zeros(5), jnp.array(0)))
    with pytest.raises(ValueError, match="leading axis of tasks"):
        losses.mean_squared_error(apply)(None, (jnp.array(0.0), jnp.array(0.0)))


def test_labels_of_sequences():
    logits = jax.random.normal(jax.random.key(0), (2, 4, 5))
    labels = jnp.arange(8).reshape(2, 4) % 5
    loss_fn = losses.cross_entropy(lambda params, x: x)
    sequences, flat = (loss_fn(None, batch) for batch in ((logits, labels), (logits.reshape(8, 5), labels.reshape(8))))
    chex.assert_trees_all_close(sequences, flat)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_weights_need_a_normalisation_of_each_example(normalisation):
    """Padding of weight 0 does not change the loss, or is refused."""
    net = models.MLP((4,), 2, normalisation)
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.float32)
    params = drawn_params(net, inputs)
    apply, labels = models.apply_params(net), jnp.array([0, 1, 0])
    padded = (inputs, labels, jnp.array([1.0, 1.0, 0.0]))
    if normalisation in ("batch", "support", "tasknorm"):
        with pytest.raises(ValueError, match="weights, but the normalisation"):
            losses.cross_entropy(apply)(params, padded)
        apply = losses.inductive(apply)
    expected = losses.cross_entropy(apply)(params, (inputs[:2], labels[:2]))[0]
    np.testing.assert_allclose(losses.cross_entropy(apply)(params, padded)[0], expected, rtol=1e-5)
