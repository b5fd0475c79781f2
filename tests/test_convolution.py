"""Every implementation of the convolution is the same function, with the same derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maml_jax import convolution, layers
from maml_jax.convolution import IMPLEMENTATIONS, conv

pytestmark = pytest.mark.usefixtures("x64")

SHAPES = [  # height, width, channels in and out, kernel, stride
    (8, 8, 3, 5, 3, 1),
    (7, 5, 2, 3, 3, 2),
    (8, 6, 1, 4, 3, 2),
    (6, 7, 2, 2, 2, 2),
    (5, 5, 2, 3, 1, 1),
    (9, 4, 3, 2, 5, 3),
]


def loop(x, kernel, stride):
    """The definition: for each output pixel the sum over its window, zero outside the image."""
    h, w = kernel.shape[:2]
    rows, columns = -(-x.shape[1] // stride), -(-x.shape[2] // stride)
    top = max((rows - 1) * stride + h - x.shape[1], 0) // 2
    left = max((columns - 1) * stride + w - x.shape[2], 0) // 2
    padded = np.pad(x, ((0, 0), (top, h), (left, w), (0, 0)))
    out = np.zeros((x.shape[0], rows, columns, kernel.shape[3]))
    for i in range(rows):
        for j in range(columns):
            window = padded[:, i * stride : i * stride + h, j * stride : j * stride + w]
            out[:, i, j] = np.tensordot(window, kernel, 3)
    return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_a_convolution_at_any_order_and_under_vmap(shape, implementation):
    height, width, channels, features, size, stride = shape
    random = np.random.default_rng(0)
    x = random.standard_normal((3, 2, height, width, channels))
    kernel = random.standard_normal((3, size, size, channels, features))
    each = jax.vmap(lambda x, k: conv(x, k, stride=stride, implementation=implementation))
    expected = np.stack([loop(*pair, stride) for pair in zip(x, kernel)])
    np.testing.assert_allclose(jax.jit(each)(x, kernel), expected, rtol=1e-12, atol=1e-12)

    def energy(x, kernel, implementation):
        out = jax.vmap(lambda x, k: conv(x, k, stride=stride, implementation=implementation))(x, kernel)
        return jnp.sum(jnp.sin(out))

    def second(implementation):
        gradient = jax.grad(energy, (0, 1))
        tangents = (jnp.cos(x), jnp.sin(kernel))
        inner = lambda x, k: sum(jnp.vdot(g, t) for g, t in zip(gradient(x, k, implementation), tangents))  # noqa: E731
        return gradient(x, kernel, implementation), jax.jit(jax.grad(inner, (0, 1)))(x, kernel)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11),
                 second(implementation), second("lax"))  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keeps_low_precision(implementation):
    x, kernel = jnp.ones((1, 6, 6, 2), jnp.bfloat16), jnp.ones((3, 3, 2, 4), jnp.bfloat16)
    out = conv(x, kernel, implementation=implementation)
    assert out.dtype == jnp.bfloat16 and out[0, 2, 2, 0] == 18


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="patches, lax, but got 'fft'"):
        conv(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)), implementation="fft")


def test_the_backend_decides_in_one_place(monkeypatch):
    for backend, expected in (("cpu", "patches"), ("gpu", "lax"), ("tpu", "lax")):
        monkeypatch.setattr(convolution.jax, "default_backend", lambda backend=backend: backend)
        assert convolution.default_implementation() == expected


@pytest.mark.parametrize("size", [6, 7])
def test_max_pool_is_reduce_window_with_its_derivative(size):
    import flax.linen as nn

    x = np.random.default_rng(0).standard_normal((2, size, size, 3))
    ours = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(layers.max_pool(x))))(x)
    flax = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(nn.max_pool(x, (2, 2), (2, 2)))))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14), ours, flax)


def test_batch_norm_uses_the_batch_at_hand_and_has_an_offset_only():
    x = np.random.default_rng(0).standard_normal((4, 5, 5, 3)) * 3 + 1
    params = layers.BatchNorm().init(jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, params) == {"offset": (3,)}
    out = layers.BatchNorm().apply({"params": {"offset": jnp.array([1.0, 2.0, 3.0])}}, x)
    expected = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-3) + [1, 2, 3]
    np.testing.assert_allclose(out, expected, rtol=1e-12)
