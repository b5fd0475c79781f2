"""Tests of programs in float64: the same values as a program that is written in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maml_jax.autodiff.widening import in_float64

pytestmark = pytest.mark.usefixtures("x64")


def loops(x, dtype):
    x = x.astype(dtype)
    total, stacked = jax.lax.scan(
        lambda total, row: (total + row / 3, total * row), jnp.zeros(3, dtype), x, reverse=True
    )
    _, grown = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * x[0] / 7 + 1), (0, total))
    return jax.lax.cond(x.sum() > 0, lambda y: y / 3, lambda y: y / 7, grown), stacked


def calls(x, dtype):
    x = jax.jit(lambda x: x.astype(dtype) / 3)(x)
    return jax.checkpoint(jnp.sin)(x), jax.nn.relu(x), jax.nn.logsumexp(x, -1)


def derivatives(x, dtype):
    def loss(x):
        x = jax.lax.reduce_precision(x.astype(dtype), 8, jnp.finfo(dtype).nmant)
        product = jnp.dot(x, x.T, preferred_element_type=dtype, precision="highest")
        return optax.softmax_cross_entropy_with_integer_labels(product, jnp.array([0, 1])).sum().astype(float)

    return jax.grad(loss)(x)


def literals_and_drawn_numbers(x, dtype):
    noise = jax.random.normal(jax.random.key(0), x.shape, jnp.float32)
    return jnp.where(x > 0, jnp.asarray(0.5, dtype) * x.astype(dtype), jnp.arange(3, dtype=dtype) / 3) + noise


@pytest.mark.parametrize("fn", [loops, calls, derivatives, literals_and_drawn_numbers])
def test_values_are_those_of_the_program_in_float64(fn):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3)))
    got, expected = in_float64(lambda x: fn(x, jnp.bfloat16))(x), fn(x, jnp.float64)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(fn(x, jnp.bfloat16)), jax.tree.leaves(expected)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=1e-4 if fn is literals_and_drawn_numbers else 1e-12)


def test_a_call_of_the_host_keeps_its_types():
    def on_host(x):
        assert x.dtype == np.float32
        return x * 2

    def fn(x):
        x = x.astype(jnp.float32)
        return jax.pure_callback(on_host, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="sequential")

    result = in_float64(fn)(jnp.array([0.1]))
    assert result.dtype == jnp.float64 and result == np.float64(np.float32(0.1)) * 2


def test_products_with_an_algorithm_for_one_type():
    def fn(x):
        return jnp.dot(x.astype(jnp.float32), jnp.ones(1, jnp.float32), precision="F32_F32_F32")

    assert in_float64(fn)(jnp.array([0.1])) == 0.1
