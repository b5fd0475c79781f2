"""Inner learners: learned rates, and optimizers with extra arguments or unusual states."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.algorithm_cases import STEPS, assert_close, assert_exact_meta_gradient, meta_gradient, start_params
from helpers.model_zoo import ZOO, tasks

import maml_jax
from maml_jax.inner import inner_loop

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize(("rates", "weights"), [("layer", None), ("layer_step", (0.1, 0.2, 0.3, 0.4))])
def test_exact_meta_gradient_of_learned_rates(rates, weights):
    def inner(order):
        return maml_jax.sgd(0.3, steps=STEPS, order=order, learn_rates=rates)

    assert_exact_meta_gradient(inner, start_params(), weights)


def test_each_inner_step_uses_its_learned_rates():
    """On the loss |p - c|^2 / 2, a step with rate r multiplies the distance by 1 - r.

    Later steps than in training use the rate of the last training step.
    """
    inner = maml_jax.sgd(0.5, steps=2, learn_rates="layer_step")

    def loss_fn(params, batch):
        return sum(jnp.sum((params[name] - batch[name]) ** 2) for name in params) / 2, {}

    learner = maml_jax.maml(loss_fn, inner, optax.sgd(1.0))
    state = learner.init({"a": jnp.ones(2), "b": jnp.ones(3)})
    assert_close(state.inner_params, {"a": jnp.full(2, 0.5), "b": jnp.full(2, 0.5)})
    state = state._replace(inner_params={"a": jnp.array([0.1, 0.2]), "b": jnp.array([0.3, 0.4])})
    adapted, _ = learner.adapt(state, {"a": jnp.zeros(2), "b": jnp.zeros(3)}, 3)
    assert_close(adapted, {"a": jnp.full(2, 0.9 * 0.8 * 0.8), "b": jnp.full(3, 0.7 * 0.6 * 0.6)})


def test_optimizers_that_take_the_loss_get_the_loss():
    """Polyak's step size is the loss divided by the squared norm of its gradient. The inner loop differentiates this
    step size too."""
    squares = lambda p, batch: (jnp.square(batch @ p - 1).mean(), {})  # noqa: E731
    params, batch = jnp.ones(3), maml_jax.Task(*np.random.default_rng(0).standard_normal((2, 3, 4, 3)))
    learner = maml_jax.maml(squares, maml_jax.sgd(0.3, steps=1), optax.polyak_sgd(max_learning_rate=1e3))
    by_descent = maml_jax.maml(squares, maml_jax.sgd(0.3, steps=1), optax.sgd(1.0))
    after, _ = jax.jit(learner.step)(learner.init(params), batch)
    descended, info = jax.jit(by_descent.step)(by_descent.init(params), batch)
    rate = info.loss / info.grad_norm**2
    assert_close(after.params, params + rate * (descended.params - params))
    inner = maml_jax.unrolled(optax.polyak_sgd(max_learning_rate=1e3), steps=2)
    assert maml_jax.check_meta_gradient(squares, params, batch, inner).exact
    # First order: the gradient at the adapted parameters. The step size is constant.
    first = maml_jax.maml(squares, inner._replace(order=1), optax.sgd(1.0))
    moved, _ = meta_gradient(first, first.init(params), batch)
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], batch) for i in range(3)]
    adapt = jax.jit(lambda support: first.adapt(first.init(params), support)[0])
    grads = [jax.grad(lambda p, b: squares(p, b)[0])(adapt(task.support), task.query) for task in each]
    assert_close(moved, sum(grads) / 3)
    # An optimizer with other extra arguments gets neither the loss nor the gradient by name.
    sharp = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), sync_period=2)
    learner = maml_jax.maml(squares, maml_jax.sgd(0.3, steps=1), sharp)
    assert np.isfinite(jax.jit(learner.step)(learner.init(params), batch)[1].grad_norm)


def test_wrong_arguments_raise_errors():
    loss_fn, params = ZOO["dict"]()
    with pytest.raises(ValueError, match="learn_rates must be one of 'parameter', 'layer', 'layer_step', but got True"):
        maml_jax.sgd(0.3, steps=1, learn_rates=True)
    for changed in ({}, {**params, "b1": params["b1"][None]}, {**params, "b1": params["b1"].astype(jnp.float16)}):
        inner = maml_jax.sgd(0.3, steps=1, start=lambda params, support, changed=changed: changed)
        learner = maml_jax.maml(loss_fn, inner, optax.sgd(1.0))
        with pytest.raises(ValueError, match="start must return parameters of the same structure, shapes and types"):
            learner.step(learner.init(params), tasks(1))


def test_optimizers_that_take_the_gradient_by_name_get_it():
    def update(updates, state, params=None, *, grad):
        return jax.tree.map(lambda leaf: -0.1 * leaf, grad), state

    by_name = optax.GradientTransformationExtraArgs(lambda params: (), update)
    batch = maml_jax.Task(jnp.ones((2, 3)), jnp.zeros((2, 3)))
    got, expected = (
        jax.jit(learner.step)(learner.init(jnp.zeros(3)), batch)[0].params
        for optimizer in (by_name, optax.sgd(0.1))
        for learner in [maml_jax.maml(quadratic, maml_jax.unrolled(optimizer, steps=2), optimizer)]
    )
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    np.testing.assert_allclose(got, -0.1 * 0.9**2 * (1 - 0.9**2), rtol=1e-12)  # Two steps to 1, and the slope to 0.


def quadratic(params, batch):
    return 0.5 * jnp.sum((params - batch) ** 2), {}


def test_an_optimizer_whose_initial_state_is_a_python_number():
    """The inner loop converts the initial state to the type that a step returns, as a scan requires."""
    init = lambda params: 0  # noqa: E731
    update = lambda grads, state, params=None: (-0.1 * grads, 2 * state + optax.tree.norm(grads))  # noqa: E731
    inner = maml_jax.unrolled(optax.GradientTransformation(init, update), steps=3)
    params, _ = inner_loop(inner, quadratic, jnp.ones(2, jnp.bfloat16), (), jnp.zeros(2, jnp.bfloat16))
    assert params.dtype == jnp.bfloat16
    np.testing.assert_allclose(params.astype(float), 0.9**3, rtol=0.02)


def test_without_compilation_the_loss_is_called_with_concrete_values():
    seen = []

    def loss_fn(params, batch):
        loss, aux = quadratic(params, batch)
        seen.append(str(loss))
        return loss, aux

    with jax.disable_jit():
        inner_loop(maml_jax.sgd(0.5, steps=3), loss_fn, jnp.ones(1), (), 0.0)
    assert len(seen) == 3 and all(number in text for number, text in zip(("0.5", "0.125", "0.03125"), seen))
