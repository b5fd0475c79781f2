"""Tests of running statistics for each inner step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers.model_zoo import drawn_params

import maml_jax
from maml_jax import Task, losses
from maml_jax.algorithms import running_statistics
from maml_jax.algorithms.maml_plus_plus import select_step
from maml_jax.nets import models


def test_statistics_of_one_task_equal_the_moments_of_its_queries(x64):
    """They are equal after each inner step. Predictions with these statistics do not depend on other queries."""
    shape, random = (6,), np.random.default_rng(3)
    task = Task(
        (random.standard_normal((1, 3, *shape)), jnp.arange(3)[None]),
        (random.standard_normal((1, 4, *shape)), jnp.array([[0, 1, 2, 0]])),
    )
    trained, evaluated_net = models.MLP((8, 8), 3, "batch"), models.MLP((8, 8), 3, "running")
    params = drawn_params(trained, task.query[0][0])
    loss_fn, query_loss_fn = (losses.cross_entropy(models.apply_params(net)) for net in (trained, evaluated_net))
    inner = maml_jax.sgd(0.5, steps=2, trainable=models.all_but_norms)
    expected = maml_jax.maml(loss_fn, inner, optax.identity())
    batch = jax.jit(expected.evaluate)(expected.init(params), task)

    gather = jax.jit(lambda task: running_statistics.gather(trained, inner, loss_fn, params, (), task, steps=2))
    gathered = gather(task)
    per_step_inner = inner._replace(params_at_step=select_step(models.norms_only))

    def evaluated(query_loss_fn):
        learner = maml_jax.maml(loss_fn, per_step_inner, optax.identity(), query_loss_fn=query_loss_fn)
        return jax.jit(learner.evaluate)(learner.init(gathered), task)

    same = evaluated(query_loss_fn)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), same, batch)
    alone = evaluated(losses.cross_entropy(losses.inductive(models.apply_params(evaluated_net))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), alone, same)
    # The statistics of two tasks differ from the statistics of each.
    both = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:, ::-1] ** 2]), task)
    gathered = gather(both)
    assert np.abs(evaluated(query_loss_fn).loss - batch.loss).max() > 1e-3
