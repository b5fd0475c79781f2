"""Reptile moves the parameters towards the adapted parameters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.algorithm_cases import LOSS, assert_close, start_params
from helpers.model_zoo import tasks

import maml_jax
from maml_jax.algorithms import heads
from maml_jax.algorithms.maml_plus_plus import select_step
from maml_jax.algorithms.reptile import one_of_each_class, reptile
from maml_jax.nets import models

pytestmark = pytest.mark.usefixtures("x64")


def test_reptile_moves_towards_the_adapted_parameters():
    params, batch = start_params(), tasks(3)
    inner = maml_jax.sgd(0.3, steps=4)
    learner = reptile(LOSS, inner, optax.sgd(0.25))
    after, info = jax.jit(learner.step)(learner.init(params), batch)
    adapted = [
        maml_jax.adapt(LOSS, params, jax.tree.map(lambda leaf, i=i: leaf[i], batch.support), learning_rate=0.3, steps=4)
        for i in range(3)
    ]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *(each for each, _ in adapted))
    assert_close(after.params, jax.tree.map(lambda p, m: p + 0.25 * (m - p), params, mean))
    assert info.support_loss.shape == (3, 4)


def test_each_inner_step_uses_one_example_of_every_class():
    """With four classes of two examples each, the third step uses the first examples again."""
    params = start_params()
    learner = reptile(LOSS, maml_jax.sgd(0.3, steps=4), optax.sgd(1.0), batches=one_of_each_class(4))
    task = jax.tree.map(lambda leaf: leaf[:1], tasks(1, shots=8))
    after, _ = jax.jit(learner.step)(learner.init(params), task)
    adapted = params
    for rows in ([0, 2, 4, 6], [1, 3, 5, 7], [0, 2, 4, 6], [1, 3, 5, 7]):
        batch = jax.tree.map(lambda leaf, rows=rows: leaf[0, jnp.array(rows)], task.support)
        adapted, _ = maml_jax.adapt(LOSS, adapted, batch, learning_rate=0.3, steps=1)
    assert_close(after.params, adapted)


def test_wrong_arguments_raise_errors():
    for inner in (
        maml_jax.sgd(0.3, steps=2, start=heads.shared()),
        maml_jax.sgd(0.3, steps=2, params_at_step=select_step(models.norms_only)),
    ):
        with pytest.raises(ValueError, match="reptile takes an inner learner without start and params_at_step"):
            reptile(LOSS, inner, optax.sgd(1.0))
    with pytest.raises(ValueError, match="no gradient for learned parameters of the inner update"):
        reptile(LOSS, maml_jax.sgd(0.3, steps=2, learn_rates="layer"), optax.sgd(1.0)).init(start_params())


def test_the_outer_optimizer_does_not_get_the_loss():
    """The direction of Reptile is not the gradient of a loss, so Polyak's step size raises an error."""
    squares = lambda p, batch: (jnp.square(batch @ p - 1).mean(), {})  # noqa: E731
    batch = maml_jax.Task(*np.random.default_rng(0).standard_normal((2, 3, 4, 3)))
    learner = reptile(squares, maml_jax.sgd(0.3, steps=2), optax.polyak_sgd())
    with pytest.raises(TypeError, match="value"):
        learner.step(learner.init(jnp.ones(3)), batch)


def test_no_inner_step_raises():
    for algorithm in (maml_jax.reptile, partial(maml_jax.imaml, proximal_weight=1.0, cg_steps=1)):
        with pytest.raises(ValueError, match=r"inner\.steps must be an integer of at least 1, but got 0"):
            algorithm(LOSS, maml_jax.no_adaptation(), optax.sgd(0.1))
