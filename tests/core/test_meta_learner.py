"""The learner around the meta-gradient: outer optimizer, donated state, evaluation and compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.model_zoo import ZOO, tasks

import maml_jax
from maml_jax import Task


def test_evaluation_uses_the_inner_loop_of_training():
    """The columns of an evaluation are the losses along the inner loop of training."""
    loss_fn, params = ZOO["dict"]()
    batch = tasks(3)
    learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.3, steps=2), optax.sgd(1.0))
    state = learner.init(params)
    evaluation = jax.jit(learner.evaluate, static_argnums=2)(state, batch, 4)
    assert evaluation.loss.shape == evaluation.support_loss.shape == evaluation.aux["accuracy"].shape == (3, 5)
    _, info = jax.jit(learner.step)(state, batch)
    np.testing.assert_allclose(evaluation.loss[:, 2].mean(), info.loss, rtol=1e-12)
    np.testing.assert_allclose(evaluation.support_loss[:, :2], info.support_loss, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(learner.evaluate)(state, batch).loss, evaluation.loss[:, :3], rtol=1e-12)
    last = jax.jit(lambda state, batch: learner.evaluate(state, batch, 4, only_last=True))(state, batch)
    jax.tree.map(lambda one, all: np.testing.assert_allclose(one, all[:, 4:], rtol=1e-12), last, evaluation)
    assert learner.evaluate(state, batch, 0).loss.shape == (3, 1)
    for index in range(3):
        task = jax.tree.map(lambda leaf, index=index: leaf[index], batch)
        adapted, info = maml_jax.adapt(loss_fn, params, task.support, learning_rate=0.3, steps=4)
        np.testing.assert_allclose(loss_fn(adapted, task.query)[0], evaluation.loss[index, -1], rtol=1e-12)
        np.testing.assert_allclose(info.loss, evaluation.support_loss[index], rtol=1e-12)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("at_once", [None, 2])
def test_evaluation_does_not_depend_on_devices(count, at_once):
    loss_fn, params = ZOO["dict"]()
    plain, spread = (
        maml_jax.maml(loss_fn, maml_jax.sgd(0.3, steps=2), optax.sgd(1.0), task_batch_size=at_once, mesh=mesh)
        for mesh in (None, jax.make_mesh((2,), ("any",)))
    )
    expected, got = (jax.jit(learner.evaluate)(learner.init(params), tasks(count)) for learner in (plain, spread))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, expected)


def test_a_state_can_be_donated_if_the_optimizer_state_contains_parameters():
    loss_fn, params = ZOO["dict"]()
    learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.3, steps=1), optax.contrib.prodigy())
    state, _ = jax.jit(learner.step, donate_argnums=0)(learner.init(params), tasks(2))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_donating_the_state_does_not_delete_the_given_parameters():
    loss_fn, params = ZOO["dict"]()
    learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.3, steps=1), optax.sgd(1.0))
    jax.jit(learner.step, donate_argnums=0)(learner.init(params), tasks(2))
    jax.tree.map(np.asarray, params)


def test_adaptation_and_evaluation_compile_once(caplog):
    """A second call without jit, with other values of the same shapes, compiles nothing."""
    loss_fn, params = ZOO["dict"]()
    learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.1, steps=3), optax.sgd(0.1))
    state, batch = learner.init(params), tasks(2)
    task = jax.tree.map(lambda leaf: leaf[0], batch)

    def call(factor):
        scaled = jax.tree.map(lambda leaf: factor * leaf, params)
        maml_jax.adapt(loss_fn, scaled, task.support, learning_rate=0.01 * factor, steps=3)
        learner.adapt(state._replace(params=scaled), task.support)
        learner.evaluate(state._replace(params=scaled), batch, 2)

    compiled = []
    for factor in (1.0, 0.5):
        with jax.log_compiles(True):
            call(factor)
        compiled.append(sum("Finished XLA compilation" in record.getMessage() for record in caplog.records))
        caplog.clear()
    assert compiled[0] > 0 and compiled[1] == 0


def test_an_outer_optimizer_with_labels_freezes_parameters():
    """The outer optimizer gets only the parameters, so labels and masks have the structure of the parameters."""
    loss_fn, params = ZOO["dict"]()
    labels = {name: "off" if index == 0 else "on" for index, name in enumerate(params)}
    outer = optax.multi_transform({"on": optax.adam(1e-2), "off": optax.set_to_zero()}, labels)
    learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.1, steps=1), outer)
    state, _ = jax.jit(learner.step)(learner.init(params), tasks(2))
    for name in params:
        changed = any(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), params[name], state.params[name])))
        assert changed == (labels[name] == "on")


def test_the_norm_of_a_half_precision_gradient_is_finite():
    """70,000 gradients of 1 have a norm of 265, whose square float16 cannot hold."""
    learner = maml_jax.maml(
        lambda params, batch: ((params * batch).sum().astype(jnp.float32), {}),
        maml_jax.sgd(1e-3, steps=1),
        optax.sgd(0.0),
    )
    batch = jnp.ones((1, 1), jnp.float16)
    _, info = jax.jit(learner.step)(learner.init(jnp.zeros(70_000, jnp.float16)), Task(batch, batch))
    np.testing.assert_allclose(info.grad_norm, 70_000**0.5, rtol=1e-3)
