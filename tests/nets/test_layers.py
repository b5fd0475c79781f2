"""Tests of layers: all implementations equal the definition, with derivatives."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maml_jax.nets import layers, normalisation
from maml_jax.nets.convolution import conv
from maml_jax.parallel import backend

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3)])
def test_dense_equals_flax_dense(shape):
    x = np.random.default_rng(0).standard_normal(shape)
    params = nn.Dense(5).init(jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        jnp.shape, layers.Dense(5).init(jax.random.key(0), x)["params"]
    )

    def second(layer):
        energy = lambda p: jnp.sum(jnp.sin(layer.apply({"params": p}, x)))  # noqa: E731
        along = lambda p: sum(jnp.sum(g * p[name]) for name, g in jax.grad(energy)(p).items())  # noqa: E731
        return layer.apply({"params": params}, x), jax.grad(energy)(params), jax.grad(along)(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
        second(layers.Dense(5)),
        second(nn.Dense(5)),
    )
    without = layers.Dense(5, use_bias=False).init(jax.random.key(0), x)["params"]
    assert list(without) == ["kernel"]


@pytest.mark.parametrize("size", [(6, 6), (7, 4)])
def test_max_pool_equals_flax_max_pool_with_derivatives(size):
    x = np.random.default_rng(0).standard_normal((2, *size, 3))
    ours = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(layers.max_pool(x))))(x)
    flax = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(nn.max_pool(x, (2, 2), (2, 2)))))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14), ours, flax)


@pytest.mark.parametrize("place", range(4))
def test_max_pool_propagates_nan(place):
    x = np.arange(4.0).reshape(1, 2, 2, 1)
    x.ravel()[place] = np.nan
    assert np.isnan(layers.max_pool(x)).all()


def test_max_pool_selects_one_of_equal_entries():
    gradient = jax.grad(lambda x: layers.max_pool(x).sum())(jnp.ones((1, 4, 4, 1)))
    assert gradient.sum() == 4 and set(np.unique(gradient)) == {0, 1}


@pytest.mark.parametrize(("size", "kind", "features"), [(6, "batch", 4), (7, "instance", 4), (6, "batch", 18)])
def test_pooled_convolution_does_not_depend_on_the_loop_over_images(size, kind, features, monkeypatch):
    """Values, first and second derivatives, with a loop over images and without."""
    random = np.random.default_rng(0)
    x, params = random.standard_normal((3, size, size, 2)), {"kernel": random.standard_normal((3, 3, 2, features))}
    layer = layers.PooledConv(features)
    norm = normalisation.Norm(kind).bind({"params": {"offset": random.standard_normal(features)}})

    def value_and_derivatives(maps_over_images):
        monkeypatch.setattr(backend, "maps_over_images", lambda images, channels, features: maps_over_images)

        def apply(params):
            return layer.apply({"params": params}, x, norm)

        def loss(params):
            return jnp.sum(jnp.sin(apply(params)))

        def along(params):
            return (jax.grad(loss)(params)["kernel"] * jnp.cos(params["kernel"])).sum()

        return jax.jit(lambda p: (apply(p), jax.grad(loss)(p), jax.grad(along)(p)))(params)

    whole, looped = value_and_derivatives(False), value_and_derivatives(True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), looped, whole)
    # Normalisation before pooling gives the same result.
    expected = layers.max_pool(norm(conv(x, params["kernel"])))
    np.testing.assert_allclose(whole[0], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("size", "stride", "channels", "maps_over_images"), [(8, 1, 1, True), (7, 2, 1, False), (8, 2, 3, True)]
)
def test_moments_of_a_convolution_from_its_input(size, stride, channels, maps_over_images, x64, monkeypatch):
    """They equal the moments of the output, with first and second derivatives in kernel and images, under vmap."""
    random = np.random.default_rng(1)
    monkeypatch.setattr(backend, "maps_over_images", lambda images, channels, features: maps_over_images)
    x, kernels = random.random((3, size, size, channels)) + 5, random.standard_normal((2, 3, 3, channels, 30))

    def derivatives(moments):
        def scalar(kernel, x):
            mean, variance = moments(kernel, x)
            return jnp.sum(jnp.cos(mean) * jnp.sqrt(variance))

        def along(kernel, x):
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.grad(scalar, (0, 1))(kernel, x))

        return jax.jit(jax.vmap(lambda kernel: (moments(kernel, x), jax.grad(along, (0, 1))(kernel, x))))(kernels)

    got = derivatives(lambda kernel, x: layers.output_moments(x, kernel, stride))
    expected = derivatives(lambda kernel, x: normalisation.moments_over_batch(conv(x, kernel, stride=stride)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9), got, expected)


def test_moments_are_precise_for_bright_images():
    """The images are in float32, with a mean that is large relative to the variance."""
    random = np.random.default_rng(2)
    x = (random.standard_normal((4, 12, 12, 3)) * 0.001 + 1).astype(np.float32)
    kernel = random.standard_normal((1, 1, 3, 32)).astype(np.float32)
    exact = x.astype(np.float64) @ kernel[0, 0].astype(np.float64)
    got = layers.output_moments(jnp.asarray(x), jnp.asarray(kernel))
    np.testing.assert_allclose(got.variance, exact.var((0, 1, 2)), rtol=1e-3)


def test_moments_are_precise_for_kernels_that_cancel_the_mean():
    """The images are almost grey, in float32. The sum of each kernel over channels is zero."""
    random = np.random.default_rng(4)
    grey, colour = random.random((4, 12, 12, 1)), random.standard_normal((4, 12, 12, 3))
    x = (grey + 0.02 * colour).astype(np.float32)
    kernel = random.standard_normal((3, 3, 3, 32)).astype(np.float32)
    kernel -= kernel.mean(2, keepdims=True)
    exact = normalisation.moments_over_batch(conv(x.astype(np.float64), kernel.astype(np.float64)))
    np.testing.assert_allclose(layers.output_moments(x, kernel).variance, exact.variance, rtol=1e-3)


@pytest.mark.parametrize("stride", [1, 2])
def test_normalising_the_kernel_equals_normalising_the_output(stride, x64):
    """With 3 channels the layer normalises the kernel, with 4 channels the output."""
    random = np.random.default_rng(3)
    norm = normalisation.Norm("batch").bind({"params": {"offset": random.standard_normal(32)}})
    for channels in (3, 4):
        x, kernel = random.random((4, 9, 9, channels)), random.standard_normal((3, 3, channels, 32))
        got = layers.Conv(32, stride=stride).apply({"params": {"kernel": kernel}}, x, norm)
        np.testing.assert_allclose(got, norm(conv(x, kernel, stride=stride)), rtol=1e-9, atol=1e-11)
    products = jax.make_jaxpr(lambda x: layers.Conv(32).apply({"params": {"kernel": kernel[:, :, :3]}}, x, norm))
    assert "square" not in str(products(x[..., :3]))  # The moments of the output would need squares.
