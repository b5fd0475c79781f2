"""A small classifier and assertions for the tests of algorithms."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers.model_zoo import INPUTS, WAYS, drawn_params, tasks

import maml_jax
from maml_jax import losses, meta
from maml_jax.nets import models

NET = models.MLP((8, 6), WAYS, "layer")
LOSS = losses.cross_entropy(models.apply_params(NET))
STEPS = 3


def start_params():
    params = drawn_params(NET, jnp.zeros((1, INPUTS)))
    return jax.tree.map(lambda leaf: leaf.astype(float), params)


def features(params, inputs):
    return NET.apply({"params": params}, inputs, head=False)


def assert_close(got, expected, rtol=1e-10, atol=1e-13):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, expected)


def meta_gradient(learner, state, batch):
    """The meta-gradient in parameters and inner_params, which a step of `optax.sgd(1.0)` subtracts."""
    after, _ = jax.jit(learner.step)(state, batch)
    return jax.tree.map(jnp.subtract, (state.params, state.inner_params), (after.params, after.inner_params))


def assert_exact_meta_gradient(inner_of_order: Callable, params, step_weights=None):
    """Compares the jitted meta-gradient in parameters and inner_params with central differences of the meta-loss.

    Also asserts that the first-order meta-gradient is different.
    """
    inner, batch = inner_of_order(2), tasks(2)
    learner = maml_jax.maml(LOSS, inner, optax.sgd(1.0), step_weights=step_weights)
    state = learner.init(params)
    random = np.random.default_rng(0)

    def drawn(tree, size):
        return jax.tree.map(lambda leaf: jnp.asarray(size * random.standard_normal(leaf.shape)), tree)

    # Start a random step away from the initial values: those have equal copies, equal rates and identity matrices.
    start = (state.params, state.inner_params)
    start = jax.tree.map(jnp.add, start, drawn(start, 0.05))
    state = state._replace(params=start[0], inner_params=start[1])
    direction = drawn(start, 1.0)

    @jax.jit
    def loss(distance):
        at = jax.tree.map(lambda leaf, d: leaf + distance * d, start, direction)
        task_loss = partial(meta.task_loss, LOSS, LOSS, inner, at, step_weights=step_weights)
        return jax.vmap(lambda task: task_loss(task)[0])(batch).mean()

    def slope(gradient):
        return sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction)))

    expected = (8 * (loss(1e-5) - loss(-1e-5)) - (loss(2e-5) - loss(-2e-5))) / 12e-5
    np.testing.assert_allclose(slope(meta_gradient(learner, state, batch)), expected, rtol=1e-7)
    first_order = maml_jax.maml(LOSS, inner_of_order(1), optax.sgd(1.0), step_weights=step_weights)
    assert abs(slope(meta_gradient(first_order, state, batch)) / expected - 1) > 1e-3
