"""Tests of the paper's networks: sizes, initial distributions, and the parameters that the inner loop adapts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.algorithm_cases import LOSS, start_params
from helpers.model_zoo import tasks

import maml_jax
from maml_jax import losses
from maml_jax.nets import models


def initial(net, *shape):
    return jax.jit(net.init)(jax.random.key(0), jnp.zeros(shape))["params"]


@pytest.mark.parametrize(
    ("net", "shape", "size"),
    [  # There are no biases before a normalisation.
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
    # A normal distribution of scale 0.01, truncated at two scales as in TensorFlow, has the standard deviation 0.0088.
    assert np.abs(first).max() <= 0.02 and np.isclose(first.std(), 0.0088, rtol=0.02)
    for params in (strided, pooled, mlp):
        assert not np.any(params["head"]["bias"])


def test_all_but_norms_leaves_out_norms_only():
    params = jax.eval_shape(models.ConvNet(5).init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    mask = models.all_but_norms(params)
    assert mask["Norm_0"] == {"offset": False}
    assert mask["Conv_0"] == {"kernel": True} and mask["head"] == {"kernel": True, "bias": True}


def test_masks_of_anil_and_boil():
    batch = jax.tree.map(lambda leaf: leaf[0], tasks(1))
    params = start_params()
    for mask, adapts in ((models.head_only, {"head"}), (models.body_only, {"Dense_0", "Dense_1"})):
        learner = maml_jax.maml(LOSS, maml_jax.sgd(0.3, steps=2, trainable=mask), optax.sgd(1.0))
        adapted, _ = learner.adapt(learner.init(params), batch.support)
        changed = {
            layer
            for layer, leaves in params.items()
            if any(not np.array_equal(leaf, adapted[layer][name]) for name, leaf in leaves.items())
        }
        assert changed == adapts


def test_images_too_small_for_the_pooled_net_raise():
    net = models.ConvNet(5, filters=4, pooled=True)
    with pytest.raises(ValueError, match=r"at least 16x16 pixels.* but have 8x8"):
        net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    assert net.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]["head"]["kernel"].shape == (4, 5)


class WithState(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(2)(x))


def test_apply_params_takes_other_state_or_names_it():
    net, x = WithState(), jnp.array([[1.0], [2.0], [4.0]])
    variables = net.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"more state than its parameters.*batch_stats"):
        models.apply_params(net)(variables["params"], x)
    normalised = models.apply_params(net, state={"batch_stats": variables["batch_stats"]})(variables["params"], x)
    np.testing.assert_allclose(normalised.std(0), 1, rtol=1e-2)
    running = models.apply_params(net, state={"batch_stats": variables["batch_stats"]}, train=False)
    np.testing.assert_allclose(running(variables["params"], x), x @ variables["params"]["Dense_0"]["kernel"], rtol=1e-4)


@pytest.mark.parametrize("net", [models.ConvNet(4, 4), models.ConvNet(4, 4, True, normalisation="tasknorm")])
def test_meta_steps_run_in_the_strict_modes_of_jax(net):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        images, labels = jnp.ones((1, 2, 16, 16, 1)), jnp.array([[0, 1]])
        params = jax.eval_shape(net.init, jax.random.key(0), images[0])["params"]
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
        loss_fn = losses.log_probabilities(models.apply_params(net))
        tasks = maml_jax.Task((images, labels), (images, labels))
        learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.1, steps=1), optax.sgd(1e-3))
        jax.eval_shape(learner.step, learner.init(params), losses.query_with_support(tasks))
