"""What inner steps have in common is computed once, and changes no number."""

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

    def trained(shared, weights, start, hoist):
        def step(w, index):
            features = jnp.tanh(shared @ weights)
            residual = features @ w - jnp.ones(4) * index
            return w - 0.1 * features.T @ residual, (jnp.sum(residual**2), {"mean": features.mean()})

        row = jax.ShapeDtypeStruct((), jnp.int64)
        return jax.lax.scan(hoist(step, start, row) if hoist else step, start, jnp.arange(3))

    def everything(hoist):
        def value(*args):
            w, (losses, _) = trained(*args, hoist)
            return jnp.sum(jnp.sin(w)) + losses.sum()

        args = (shared, weights, start)
        return jax.jit(lambda: (trained(*args, hoist), jax.grad(value, (0, 1, 2))(*args), jax.hessian(value)(*args)))()

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), everything(True), everything(False))


def test_products_with_what_changes_alone_stay_in_the_loop():
    a, b = jnp.ones((8, 8)), jnp.ones((8, 8))
    step = hoist(lambda x: (a @ b) @ x, jax.ShapeDtypeStruct((8,), jnp.float32))
    assert counted(step, jnp.ones(8)) == 2 * 8 * 8
    np.testing.assert_array_equal(step(jnp.ones(8)), np.full(8, 64))


def test_what_is_cheap_and_large_is_not_kept():
    """A mask of one number for each pixel would be read from memory in each step."""
    offset = jnp.ones(3)
    step = hoist(lambda x: x + jnp.broadcast_to(offset * 2, (100, 3)), jax.ShapeDtypeStruct((100, 3), jnp.float32))
    assert max(np.size(const) for const in jax.make_jaxpr(step)(jnp.ones((100, 3))).consts) == 3


def test_effects_stay_where_they_were():
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
def test_more_steps_of_the_head_alone_take_no_more_of_the_body(order):
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

    body = 2 * 2 * 10 * 100 * 100  # Of two tasks, forwards, its second layer.
    assert 0 < one_more({"body": False, "head": True}) < 0.2 * body
    assert one_more({"body": True, "head": True}) > body


def quadratic(params, batch):
    return 0.5 * jnp.sum((params - batch) ** 2), {}


def test_an_optimizer_whose_state_begins_with_a_plain_number():
    """It takes the type that a step gives it, as in any loop of JAX."""
    init = lambda params: 0  # noqa: E731
    update = lambda grads, state, params=None: (-0.1 * grads, 2 * state + optax.tree.norm(grads))  # noqa: E731
    inner = maml_jax.unrolled(optax.GradientTransformation(init, update), steps=3)
    params, _ = maml_jax.inner.inner_loop(inner, quadratic, jnp.ones(2, jnp.bfloat16), (), jnp.zeros(2, jnp.bfloat16))
    assert params.dtype == jnp.bfloat16
    np.testing.assert_allclose(params.astype(float), 0.9**3, rtol=0.02)


def test_without_compilation_a_loss_sees_numbers():
    seen = []

    def loss_fn(params, batch):
        loss, aux = quadratic(params, batch)
        seen.append(str(loss))
        return loss, aux

    with jax.disable_jit():
        maml_jax.inner.inner_loop(maml_jax.sgd(0.5, steps=3), loss_fn, jnp.ones(1), (), 0.0)
    assert len(seen) == 3 and all(number in text for number, text in zip(("0.5", "0.125", "0.03125"), seen))
