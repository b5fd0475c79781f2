"""Tests of losses with random numbers: a key of its own for each task, set and inner step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import maml_jax
from maml_jax.algorithms.random_losses import keyed_loss, with_keys, with_step


@pytest.mark.parametrize("remat", ["none", "mixflow"])
def test_every_task_set_and_inner_step_has_a_key_of_its_own(remat):
    def loss_fn(params, batch, key):
        drawn = jax.random.uniform(key)
        return jnp.square(params * drawn - batch).mean(), {"drawn": drawn}

    inner = maml_jax.sgd(0.1, steps=3, params_at_step=with_step, remat=remat)
    learner = maml_jax.maml(keyed_loss(loss_fn), inner, optax.sgd(0.1))
    tasks = with_keys(maml_jax.Task(jnp.ones((4, 2)), jnp.ones((4, 2))), jax.random.key(0))
    state = learner.init(jnp.zeros(()))
    after, info = jax.jit(learner.step)(state, tasks)
    evaluation = learner.evaluate(state, tasks)
    (params, step), adapted = learner.adapt(state, jax.tree.map(lambda leaf: leaf[0], tasks).support)
    drawn = np.concatenate([adapted.aux["drawn"].ravel(), evaluation.aux["drawn"].ravel()])
    assert len(set(drawn.tolist())) == 3 + 4 * 4
    np.testing.assert_array_equal(info.aux["drawn"], evaluation.aux["drawn"][:, -1])
    assert step == 3 and params.shape == () and np.isfinite(after.params) and after.params != 0


def test_an_error_names_the_loss_of_the_caller():
    def without_aux(params, batch, key):
        return jnp.zeros(())

    inner = maml_jax.sgd(0.1, steps=1, params_at_step=with_step)
    learner = maml_jax.maml(keyed_loss(without_aux), inner, optax.sgd(0.1))
    tasks = with_keys(maml_jax.Task(jnp.ones((2, 3)), jnp.ones((2, 3))), jax.random.key(0))
    with pytest.raises(TypeError, match="without_aux must return a pair"):
        learner.step(learner.init(jnp.zeros(())), tasks)
    with pytest.raises(TypeError, match="Task"):
        with_keys(tasks.support, jax.random.key(0))


def test_the_meta_gradient_of_a_random_loss_can_be_checked():
    def loss_fn(params, batch, key):
        return jnp.square(jnp.sin(params) * jax.random.uniform(key, batch.shape) - batch).mean(), {}

    inner = maml_jax.sgd(0.1, steps=1, params_at_step=with_step)
    tasks = with_keys(maml_jax.Task(jnp.ones((2, 3)), jnp.ones((2, 3))), jax.random.key(0))
    report = maml_jax.check_meta_gradient(keyed_loss(loss_fn), jnp.ones(1), tasks, inner, directions=1)
    assert report.exact and "draws random numbers" in report["precision"].meaning
