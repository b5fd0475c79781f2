"""Tests of hoisting: loop invariants are computed once, and results do not change."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import maml_jax
from experiments.benchmarks import flops
from maml_jax.autodiff.hoist import hoist
from maml_jax.tasks import sinusoid


def counted(fn, *args):
    return flops.count(jax.make_jaxpr(fn)(*args).jaxpr)


def test_results_and_derivatives_are_the_same(x64):
    rng = np.random.default_rng(0)
    shared, weights, start = rng.standard_normal((4, 5)), rng.standard_normal((5, 3)), rng.standard_normal(3)

    def trained(shared, weights, start, hoists):
        def step(w, index):
            features = jnp.tanh(shared @ weights)
            residual = features @ w - jnp.ones(4) * index
            return w - 0.1 * features.T @ residual, (jnp.sum(residual**2), {"mean": features.mean()})

        row = jax.ShapeDtypeStruct((), jnp.int64)
        return jax.lax.scan(hoist(step, start, row) if hoists else step, start, jnp.arange(3))

    def everything(hoists):
        def value(*args):
            w, (losses, _) = trained(*args, hoists)
            return jnp.sum(jnp.sin(w)) + losses.sum()

        args = (shared, weights, start)
        return jax.jit(lambda: (trained(*args, hoists), jax.grad(value, (0, 1, 2))(*args), jax.hessian(value)(*args)))()

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), everything(True), everything(False))


def test_a_product_of_invariants_leaves_the_loop():
    a, b = jnp.ones((8, 8)), jnp.ones((8, 8))
    step = hoist(lambda x: (a @ b) @ x, jax.ShapeDtypeStruct((8,), jnp.float32))
    assert counted(step, jnp.ones(8)) == 2 * 8 * 8
    np.testing.assert_array_equal(step(jnp.ones(8)), np.full(8, 64))


def test_cheap_large_arrays_are_recomputed_in_the_loop():
    """If the broadcast array were stored, each step would read it from memory."""
    offset = jnp.ones(3)
    step = hoist(lambda x: x + jnp.broadcast_to(offset * 2, (100, 3)), jax.ShapeDtypeStruct((100, 3), jnp.float32))
    assert max(np.size(const) for const in jax.make_jaxpr(step)(jnp.ones((100, 3))).consts) == 3


def test_effects_stay_in_the_loop():
    called = []
    value = jnp.ones(2)

    def step(x):
        jax.debug.callback(lambda v: called.append(float(v)), value.sum())
        return x + value.sum()

    again = hoist(step, jax.ShapeDtypeStruct((), jnp.float32))
    jax.block_until_ready((again(jnp.zeros(())), again(jnp.zeros(()))))
    jax.effects_barrier()
    assert called == [2.0, 2.0]


@pytest.mark.parametrize("order", [1, 2])
def test_more_inner_steps_of_the_head_do_not_recompute_the_body(order):
    def loss_fn(params, batch):
        x, y = batch
        features = jnp.tanh(jnp.tanh(x @ params["body"][0]) @ params["body"][1])
        return jnp.mean((features @ params["head"] - y) ** 2), {}

    params = {"body": [jnp.ones((1, 100)), jnp.ones((100, 100))], "head": jnp.ones((100, 1))}
    tasks = sinusoid.draw_tasks(jax.random.key(0), 2, shots=10, queries=10)

    def one_more(trainable):
        def operations(steps):
            inner = maml_jax.sgd(0.01, steps=steps, order=order, trainable=trainable)
            learner = maml_jax.maml(loss_fn, inner, optax.sgd(0.1))
            return counted(lambda state: learner.step(state, tasks), learner.init(params))

        return operations(6) - operations(5)

    body = 2 * 2 * 10 * 100 * 100  # Forward pass of the second layer, for two tasks.
    assert 0 < one_more({"body": False, "head": True}) < 0.2 * body
    assert one_more({"body": True, "head": True}) > body
