"""Tests of the diagnosis of losses that are not finite from the start."""

import jax.numpy as jnp
import numpy as np
import optax
from helpers.model_zoo import plain_dict, tasks

import maml_jax
from maml_jax import diagnosis


def test_values_of_tasks_are_named():
    loss_fn, params = plain_dict()
    learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.1, steps=1), optax.sgd(0.1))
    state, batch = learner.init(params), tasks(2)
    assert diagnosis.before_adaptation(learner, state, batch) == ""
    support, (inputs, labels) = batch
    from_one = maml_jax.Task(support, (inputs, labels + 1))
    message = diagnosis.before_adaptation(learner, state, from_one)
    assert "query loss is not finite before the first inner step" in message
    assert "tasks.query[1] holds integers from 1 to 4. Labels of N classes must be 0 to N - 1." in message
    not_finite = maml_jax.Task((support[0].at[1, 0, 0].set(jnp.nan), support[1]), batch.query)
    message = diagnosis.before_adaptation(learner, state, not_finite)
    assert "support loss" in message and message.endswith("Values that are not finite: tasks.support[0].")
    assert diagnosis.before_adaptation(learner, state, batch.support) == ""
    assert diagnosis.values_to_check(np.ones(3)) == ""
