"""The nets are the paper's: sizes, initial distributions and what enters the inner loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maml_jax import losses
from maml_jax.nets import models


def initial(net, *shape):
    return jax.jit(net.init)(jax.random.key(0), jnp.zeros(shape))["params"]


@pytest.mark.parametrize(
    ("net", "shape", "size"),
    [  # Without the biases that a normalisation follows: they change nothing.
        (models.MLP((40, 40), 1), (1, 1), 80 + 1640 + 41),
        (models.MLP((256, 128, 64, 64), 5, "batch"), (1, 28, 28, 1), 784 * 256 + 256 * 128 + 128 * 64
         + 64 * 64 + (256 + 128 + 64 + 64) + 64 * 5 + 5),
        (models.ConvNet(5), (1, 28, 28, 1), 9 * 64 + 3 * 9 * 64 * 64 + 4 * 64 + 64 * 5 + 5),
        (models.ConvNet(5, 32, pooled=True), (1, 84, 84, 3), 9 * 3 * 32 + 3 * 9 * 32 * 32 + 4 * 32 + 800 * 5 + 5),
    ],
)  # fmt: skip
def test_number_of_parameters(net, shape, size):
    params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size


def test_initial_distributions():
    strided, pooled = (
        initial(models.ConvNet(5), 1, 28, 28, 1),
        initial(models.ConvNet(5, 32, pooled=True), 1, 84, 84, 3),
    )
    mlp = initial(models.MLP((256, 128), 5), 1, 784)
    limit = np.sqrt(6 / (9 * 64 + 9 * 64))  # Xavier, uniform.
    kernel = np.asarray(strided["Conv_1"]["kernel"])
    assert np.abs(kernel).max() <= limit and np.isclose(kernel.std(), limit / np.sqrt(3), rtol=0.02)
    assert np.isclose(np.asarray(strided["head"]["kernel"]).std(), 1, rtol=0.15)
    head = np.asarray(pooled["head"]["kernel"])
    assert np.isclose(head.std(), np.sqrt(2 / (800 + 5)), rtol=0.05)
    first = np.asarray(mlp["Dense_0"]["kernel"])
    # A normal of .01 cut at two standard deviations, as TensorFlow's truncated_normal: its deviation is .0088.
    assert np.abs(first).max() <= 0.02 and np.isclose(first.std(), 0.0088, rtol=0.02)
    for params in (strided, pooled, mlp):
        assert not np.any(params["head"]["bias"])


def test_the_mask_leaves_out_norms_only():
    params = jax.eval_shape(models.ConvNet(5).init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    mask = models.all_but_norms(params)
    assert mask["Norm_0"] == {"offset": False}
    assert mask["Conv_0"] == {"kernel": True} and mask["head"] == {"kernel": True, "bias": True}


def test_rate_for_mean_loss_makes_the_papers_update():
    """The code's loss is the sum over N*K examples over K; its rate .4 and ours must move parameters alike."""
    ways, shots, rate = 5, 2, 0.4
    logits = jax.random.normal(jax.random.key(0), (ways * shots, ways))
    labels = jnp.arange(ways).repeat(shots)
    mean = losses.cross_entropy(lambda params, x: x + params)
    ours = jax.grad(lambda p: mean(p, (logits, labels))[0])(jnp.zeros(ways))
    one_hot = jax.nn.one_hot(labels, ways)
    paper = jax.grad(lambda p: -jnp.sum(one_hot * jax.nn.log_softmax(logits + p)) / shots)(jnp.zeros(ways))
    np.testing.assert_allclose(losses.rate_for_mean_loss(rate, ways) * ours, rate * paper, rtol=1e-5, atol=1e-6)


def test_losses_have_their_values():
    batch = (jnp.array([[1.0], [2.0]]), jnp.array([[2.0], [5.0]]))
    loss, aux = losses.mean_squared_error(lambda params, x: params * x)(1.0, batch)
    assert loss == 5.0 and aux == {}
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    loss, aux = losses.cross_entropy(lambda params, x: x)(None, (logits, jnp.array([0, 0])))
    np.testing.assert_allclose(loss, -np.log([0.5, 0.1]).mean(), rtol=1e-6)
    assert aux["accuracy"] == 0.5


def test_one_by_one_hides_examples_from_each_other():
    def centred(params, inputs, context=None):
        return inputs - (inputs if context is None else context).mean(0) + params

    inputs, context = jnp.array([[0.0], [2.0]]), jnp.array([[3.0]])
    np.testing.assert_array_equal(centred(1.0, inputs), [[0.0], [2.0]])
    np.testing.assert_array_equal(losses.inductive(centred)(1.0, inputs), [[1.0], [1.0]])
    np.testing.assert_array_equal(losses.inductive(centred)(1.0, inputs, context), [[-2.0], [0.0]])
