"""Tests of `remat`: the meta-gradient does not depend on it, and memory is as small as documented."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.model_zoo import ZOO, drawn_params, tasks

import maml_jax
from maml_jax import losses
from maml_jax.nets import layers, models
from maml_jax.nets.convolution import IMPLEMENTATIONS, ImplementationName
from maml_jax.nets.normalisation import Norm
from maml_jax.parallel import backend
from maml_jax.parallel.task_axis import task_mesh


def meta_gradient(loss_fn, inner, params, batch, **options):
    """The meta-gradient in parameters and learned rates, which a step of `optax.sgd(1.0)` subtracts."""
    learner = maml_jax.maml(loss_fn, inner, optax.sgd(1.0), **options)
    state = learner.init(params)
    after, info = jax.jit(learner.step)(state, batch)
    return jax.tree.map(jnp.subtract, (state.params, state.inner_params), (after.params, after.inner_params)), info


def assert_same(got, expected, rtol=1e-11, atol=1e-14):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, expected)


def last_leaf(params):
    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, [False] * (len(leaves) - 1) + [True])


INNER = {
    "sgd": lambda keep: maml_jax.sgd(0.3, steps=5, remat=keep),
    "Meta-SGD": lambda keep: maml_jax.sgd(0.3, steps=3, learn_rates="parameter", remat=keep),
    "ANIL": lambda keep: maml_jax.sgd(0.3, steps=3, trainable=last_leaf, remat=keep),
    "Adam": lambda keep: maml_jax.unrolled(optax.adam(0.05, eps_root=1e-8), steps=3, remat=keep),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("remat", ["full", "mixflow"])
def test_the_meta_gradient_is_the_same(remat, inner):
    loss_fn, params = ZOO["dict"]()
    expected = meta_gradient(loss_fn, INNER[inner]("none"), params, tasks(4))
    for policy in ({}, {"task_batch_size": 1}, {"task_batch_size": 2, "mesh": task_mesh(4)}):
        assert_same(meta_gradient(loss_fn, INNER[inner](remat), params, tasks(4), **policy), expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("library", ["linen", "nnx", "equinox"])
def test_the_meta_gradient_is_the_same_for_every_library(library):
    loss_fn, params = ZOO[library]()
    expected = meta_gradient(loss_fn, INNER["sgd"]("none"), params, tasks(2))
    for remat in ("full", "mixflow"):
        assert_same(meta_gradient(loss_fn, INNER["sgd"](remat), params, tasks(2)), expected)


class SmallNet(nn.Module):
    """The layers of the paper's networks. The first normalises its kernel, the second normalises its output."""

    pooled: bool
    implementation: ImplementationName | None = None

    @nn.compact
    def __call__(self, x, context=None):
        first = layers.PooledConv if self.pooled else functools.partial(layers.Conv, stride=2)
        x = nn.relu(first(4, size=2, implementation=self.implementation)(x, Norm("batch")))
        x = nn.relu(layers.PooledConv(3, size=2, implementation=self.implementation)(x, Norm("batch")))
        return layers.Dense(2)(x.reshape(len(x), -1))


def images_of_two_tasks():
    random = np.random.default_rng(5)

    def batch():
        return jnp.asarray(random.random((2, 4, 9, 8, 1))), jnp.tile(jnp.arange(2, dtype=jnp.int32), (2, 2))

    return maml_jax.Task(batch(), batch())


def lax_conv(x, kernel, *, stride=1, implementation=None):
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@functools.cache
def slow_reference(order, pooled):
    """The meta-gradient with the convolution of JAX, normalised outputs, and a Python loop over tasks; not compiled."""
    batch = images_of_two_tasks()
    net = SmallNet(pooled)
    params = jax.tree.map(lambda leaf: leaf.astype(float), drawn_params(net, batch.support[0][0]))
    inner = maml_jax.sgd(0.3, steps=2, order=order)
    learner = maml_jax.maml(losses.cross_entropy(models.apply_params(net)), inner, optax.sgd(1.0))
    state = learner.init(params)
    with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
        patch.setattr(layers, "conv", lax_conv)
        patch.setattr(backend, "normalises_kernel", lambda entries, features: False)
        each = [learner.step(state, jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch))[0].params for i in (0, 1)]
    return params, jax.tree.map(lambda p, a, b: p - (a + b) / 2, params, *each)


POLICIES = {"vmap": {"task_batch_size": "all"}, "scan": {"task_batch_size": 1}, "devices": {"mesh": task_mesh(2)}}
ORDERS = [(1, "none"), (2, "none"), (2, "full"), (2, "mixflow")]
NETS = [*((False, name) for name in IMPLEMENTATIONS), (True, None)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "pooled, implementation, policy, order, remat",
    [
        # A third of all combinations: every net with every policy and with every order, every policy with every order.
        (*net, list(POLICIES)[(i + j) % len(POLICIES)], *order)
        for i, net in enumerate(NETS)
        for j, order in enumerate(ORDERS)
    ],
)
def test_every_path_against_one_slow_reference(pooled, implementation, policy, order, remat, monkeypatch):
    params, expected = slow_reference(order, pooled)
    loss_fn = losses.cross_entropy(models.apply_params(SmallNet(pooled, implementation)))
    inner = maml_jax.sgd(0.3, steps=2, order=order, remat=remat)
    if pooled:  # Loop over images, as for large images.
        monkeypatch.setattr(backend, "maps_over_images", lambda images, channels, features: True)
    (got, _), _ = meta_gradient(loss_fn, inner, params, images_of_two_tasks(), **POLICIES[policy])
    assert_same(got, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_mixflow_differentiates_closed_over_values_and_the_batch():
    """The derivative in a weight of the loss, and in the support inputs, needs mixed second derivatives."""
    loss_fn, params = ZOO["dict"]()
    task = jax.tree.map(lambda leaf: leaf[0], tasks(1))

    def adapted_loss(weight, inputs, remat):
        def weighted(params, batch):
            loss, aux = loss_fn(params, batch)
            return weight * loss + 0.1 * weight**2 * sum(jnp.square(leaf).sum() for leaf in params.values()), aux

        learner = maml_jax.sgd(0.3, steps=3, remat=remat)
        after, info = maml_jax.inner.inner_loop(learner, weighted, params, (), (inputs, task.support[1]))
        return loss_fn(after, task.query)[0] + info.loss.sum()

    gradient = jax.jit(jax.grad(adapted_loss, (0, 1)), static_argnums=2)
    at = (jnp.asarray(0.7), task.support[0])
    assert all(jnp.abs(leaf).max() > 1e-3 for leaf in gradient(*at, "none"))
    assert_same(gradient(*at, "mixflow"), gradient(*at, "none"))


@pytest.mark.usefixtures("x64")
def test_mixflow_accepts_closed_over_values_without_derivative():
    """Traced keys, masks and integers, such as those of dropout."""
    loss_fn, params = ZOO["dict"]()
    task = jax.tree.map(lambda leaf: leaf[0], tasks(1))

    def adapted_loss(params, key, mask, number, remat):
        def with_dropout(params, batch):
            kept = jax.random.bernoulli(key, 0.7, batch[0].shape) | mask
            loss, aux = loss_fn(params, (jnp.where(kept, batch[0], 0), batch[1]))
            return loss * number, aux

        learner = maml_jax.sgd(0.3, steps=3, remat=remat)
        after, _ = maml_jax.inner.inner_loop(learner, with_dropout, params, (), task.support)
        return with_dropout(after, task.query)[0]

    gradient = jax.jit(jax.grad(adapted_loss), static_argnums=4)
    at = (params, jax.random.key(3), task.support[0][0] > 0, jnp.int32(2))
    assert_same(gradient(*at, "mixflow"), gradient(*at, "none"))


def test_mixflow_gives_gradients_of_the_type_of_the_parameters():
    """Parameters in bfloat16 and a loss in float32, as in training with low precision."""
    params = {"w": jnp.array([0.5, -1.0], jnp.bfloat16)}

    def in_float32(params, batch):
        return jnp.square(batch @ params["w"].astype(jnp.float32) - 1).mean(), {}

    batch = maml_jax.Task(*[jnp.array([[[0.5, 1.0], [1.0, -1.0]]])] * 2)
    (got, _), _ = meta_gradient(in_float32, maml_jax.sgd(0.3, steps=2, remat="mixflow"), params, batch)
    (expected, _), _ = meta_gradient(in_float32, maml_jax.sgd(0.3, steps=2), params, batch)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(got))
    assert_same(got, expected, rtol=0.02)


@pytest.mark.usefixtures("x64")
def test_mixflow_differentiates_a_custom_vjp_that_allows_no_forward_mode():
    """The forward rule calls the function itself, so its result has no derivative in forward mode."""

    @jax.custom_vjp
    def squashed(x):
        return jnp.tanh(x)

    def forward(x):
        y = squashed(x)
        return y, y

    squashed.defvjp(forward, lambda y, cotangent: ((1 - y**2) * cotangent,))

    def adapted_loss(params, scale, activation, remat):
        def loss_fn(params, batch):
            return jnp.square(activation(scale * batch @ params) - 1).mean(), {}

        learner = maml_jax.sgd(0.3, steps=2, remat=remat)
        batch = jnp.linspace(-1, 1, 12).reshape(4, 3)
        after, info = maml_jax.inner.inner_loop(learner, loss_fn, params, (), batch)
        return loss_fn(after, batch + 1)[0] + info.loss.sum()

    gradient = jax.jit(jax.grad(adapted_loss, (0, 1)), static_argnums=(2, 3))
    at = (jnp.array([0.5, -0.2, 0.1]), jnp.array(0.7))
    assert_same(gradient(*at, squashed, "mixflow"), gradient(*at, jnp.tanh, "none"))


def temporary_memory(remat, steps, order=2):
    """Bytes of temporary memory of the compiled meta-step, for a network with large activations."""
    random = np.random.default_rng(0)
    sizes = (4, 32, 32, 32, 4)
    params = [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in itertools.pairwise(sizes)]

    def apply(params, x):
        for weights in params[:-1]:
            x = jnp.tanh(x @ weights)
        return x @ params[-1]

    learner = maml_jax.maml(
        losses.mean_squared_error(apply),
        maml_jax.sgd(0.1, steps=steps, order=order, remat=remat),
        optax.sgd(0.1),
    )
    batch = tuple(jnp.zeros((1, 2048, 4)) for _ in range(2))
    lowered = jax.jit(learner.step).lower(learner.init(params), maml_jax.Task(batch, batch))
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_is_as_documented():
    copies = 4 * (4 * 32 + 32 * 32 + 32 * 32 + 32 * 4)  # Bytes of the parameters, stored for every step.
    assert temporary_memory("none", 32) > 25 * temporary_memory("mixflow", 32)
    for remat in ("full", "mixflow"):
        more = temporary_memory(remat, 32) - temporary_memory(remat, 4)
        assert more < 1.5 * 28 * copies
    # Forward mode over the gradient stores the activations of one step and their tangents.
    assert temporary_memory("mixflow", 32) - 32 * copies < 4 * temporary_memory("none", 32, order=1)


@pytest.mark.parametrize("build", [lambda **o: maml_jax.sgd(0.1, steps=1, **o),
                                   lambda **o: maml_jax.unrolled(optax.sgd(0.1), steps=1, **o)])  # fmt: skip
def test_wrong_options_raise_errors(build):
    with pytest.raises(ValueError, match="remat must be one of 'none', 'full', 'mixflow', but got 'some'"):
        build(remat="some")
    with pytest.raises(ValueError, match="remat='mixflow' is for order 2"):
        build(remat="mixflow", order=1)
