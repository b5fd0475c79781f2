"""Tests of meta-curvature: it multiplies every axis of a gradient by a learned matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.algorithm_cases import STEPS, assert_close, assert_exact_meta_gradient, start_params

import maml_jax
from maml_jax.algorithms.meta_curvature import meta_curvature

pytestmark = pytest.mark.usefixtures("x64")


def test_exact_meta_gradient():
    assert_exact_meta_gradient(lambda order: meta_curvature(0.3, steps=STEPS, order=order), start_params())


def test_starts_as_gradient_descent_and_multiplies_every_axis():
    params = {"conv": jnp.ones((3, 2, 4, 5)), "dense": jnp.ones((4, 5)), "bias": jnp.ones(5)}

    def loss_fn(params, batch):
        return sum(jnp.vdot(leaf, of) for leaf, of in zip(jax.tree.leaves(params), jax.tree.leaves(batch))), {}

    random = np.random.default_rng(4)
    gradient = jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape)), params)
    learner = maml_jax.maml(loss_fn, meta_curvature(0.1, steps=1), optax.sgd(1.0))
    state = learner.init(params)
    adapted, _ = learner.adapt(state, gradient)
    assert_close(adapted, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient))
    inner_params = jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape)), state.inner_params)
    adapted, _ = learner.adapt(state._replace(inner_params=inner_params), gradient)
    places, inputs, outputs = inner_params["conv"]
    expected = np.einsum("ap,bi,co,pio->abc", places, inputs, outputs, gradient["conv"].reshape(6, 4, 5))
    assert_close(adapted["conv"], params["conv"] - 0.1 * expected.reshape(3, 2, 4, 5))
    assert_close(
        adapted["dense"],
        params["dense"] - 0.1 * inner_params["dense"][0] @ gradient["dense"] @ inner_params["dense"][1].T,
    )
    assert_close(adapted["bias"], params["bias"] - 0.1 * inner_params["bias"][0] @ gradient["bias"])
