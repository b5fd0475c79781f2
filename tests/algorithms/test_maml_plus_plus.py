"""Tests of MAML++ and of its parts."""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers.algorithm_cases import LOSS, STEPS, assert_close, assert_exact_meta_gradient, meta_gradient, start_params
from helpers.model_zoo import ZOO, tasks

import maml_jax
from maml_jax.algorithms.maml_plus_plus import (
    maml_plus_plus,
    multi_step_weights,
    per_step_sgd,
    replicate_per_step,
    select_step,
    switch_learner,
)
from maml_jax.nets import models

pytestmark = pytest.mark.usefixtures("x64")


WEIGHTS = (0.1, 0.2, 0.3, 0.4)


def test_exact_meta_gradient_of_norms_per_step():
    def inner(order):
        return maml_jax.sgd(0.3, steps=STEPS, order=order, params_at_step=select_step(models.norms_only))

    assert_exact_meta_gradient(inner, replicate_per_step(start_params(), models.norms_only, STEPS), WEIGHTS)


def test_maml_plus_plus_equals_its_parts():
    """The first of two meta-steps is first order. The weights of the multi-step loss are annealed over both."""
    options = {"trainable": models.all_but_norms, "per_step": models.norms_only}
    learner = maml_plus_plus(LOSS, learning_rate=0.3, steps=2, meta_steps=2, multi_step_until=2, **options)
    outer = optax.adam(optax.cosine_decay_schedule(1e-3, 2, alpha=0.01))
    weights = multi_step_weights(2, until=2)
    params = start_params()
    state, step = learner.init(params), jax.jit(learner.step)
    assert state.params["Norm_0"]["offset"].shape == (3, 8) and state.inner_params["head"]["bias"].shape == (2,)
    expected = state
    for order in (1, 2):
        part = maml_jax.maml(LOSS, per_step_sgd(0.3, steps=2, order=order, **options), outer, step_weights=weights)
        assert_close(part.init(replicate_per_step(params, models.norms_only, 2)), learner.init(params))
        state, _ = step(state, tasks(2, seed=order))
        expected, _ = jax.jit(part.step)(expected, tasks(2, seed=order))
        assert_close(state, expected)
    for wrong in ("meta_steps", "multi_step_until", "first_order_until"):
        given = {"meta_steps": 4, wrong: 0}
        with pytest.raises(ValueError, match="must be an integer of at least 1, but got 0"):
            maml_plus_plus(LOSS, learning_rate=0.3, steps=2, **given)
    with pytest.raises(ValueError, match="per_step must be a pytree of bools"):
        maml_plus_plus(LOSS, learning_rate=0.3, steps=2, meta_steps=4, per_step={"other": True}).init(params)


def test_each_inner_step_has_its_own_copies():
    """The query loss after adaptation uses the copies of the last step."""
    copied = {"w": False, "of_step": True}
    inner = maml_jax.sgd(
        0.5,
        steps=2,
        trainable={"w": True, "of_step": False},
        params_at_step=select_step(copied),
    )

    def loss_fn(params, batch):
        return params["w"] * params["of_step"] * batch, {"of_step": params["of_step"]}

    learner = maml_jax.maml(loss_fn, inner, optax.sgd(1.0))
    made = replicate_per_step({"w": jnp.array(1.0), "of_step": jnp.array(7.0)}, copied, 2)
    assert_close(made, {"w": jnp.array(1.0), "of_step": jnp.full(3, 7.0)})
    state = learner.init({"w": jnp.array(1.0), "of_step": jnp.array([1.0, 10.0, 100.0])})
    task = maml_jax.Task(jnp.array([1.0]), jnp.array([1.0]))
    assert_close(learner.evaluate(state, task, 3).aux["of_step"], jnp.array([[1.0, 10.0, 100.0, 100.0]]))
    _, info = learner.step(state, task)
    assert info.aux["of_step"] == 100.0


def test_multi_step_weights_decrease_to_zero_except_for_the_last_step():
    """The weights have JAX's default type: float64 with x64, float32 without."""
    weights = multi_step_weights(4, until=100)
    assert_close(weights(jnp.int32(0)), jnp.array([0, 0.25, 0.25, 0.25, 0.25]))
    assert_close(weights(jnp.int32(60)), jnp.array([0, 0.1, 0.1, 0.1, 0.7]))
    assert_close(weights(jnp.int32(1000)), jnp.array([0, 0, 0, 0, 1.0]))
    assert weights(jnp.int32(1)).dtype == jnp.float64
    with jax.enable_x64(False):
        assert weights(jnp.int32(1)).dtype == jnp.float32
    loss_fn, params = ZOO["dict"]()
    inner, batch = maml_jax.sgd(0.3, steps=4), tasks(2)
    scheduled = maml_jax.maml(loss_fn, inner, optax.sgd(1.0), step_weights=weights)
    state = scheduled.init(params)._replace(step=jnp.int32(60))
    fixed = maml_jax.maml(loss_fn, inner, optax.sgd(1.0), step_weights=(0, 0.1, 0.1, 0.1, 0.7))
    assert_close(meta_gradient(scheduled, state, batch), meta_gradient(fixed, state, batch))


def test_switch_learner_takes_first_order_first():
    loss_fn, params = ZOO["dict"]()
    first, second = (maml_jax.maml(loss_fn, maml_jax.sgd(0.3, steps=2, order=o), optax.adam(0.1)) for o in (1, 2))
    both = switch_learner(first, second, after=2)
    state = both.init(params)
    step = jax.jit(both.step)
    for number in range(4):
        expected, _ = jax.jit((first if number < 2 else second).step)(state, tasks(2, seed=number))
        state, _ = step(state, tasks(2, seed=number))
        assert_close(state.params, expected.params)
