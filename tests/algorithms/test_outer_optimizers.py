"""Tests of separate outer optimizers for parameters and learned rates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.model_zoo import plain_dict, tasks

import maml_jax
from maml_jax.algorithms.outer_optimizers import separate_outer

FROZEN = {"w1": "off", "b1": "on", "w2": "on", "b2": "on"}


def test_masks_fit_the_parameters_and_rates_do_not_decay():
    loss_fn, params = plain_dict()
    labelled = optax.multi_transform(
        {"on": optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1)), "off": optax.set_to_zero()}, FROZEN
    )
    inner, batch = maml_jax.sgd(0.1, steps=2, learn_rates="layer"), tasks(2)

    def gradient(outer):
        learner = maml_jax.maml(loss_fn, inner, outer)
        before = learner.init(params)
        after, _ = jax.jit(learner.step)(before, batch)
        return before.meta_params, jax.tree.map(jnp.subtract, before.meta_params, after.meta_params)

    before, plain = gradient(optax.sgd(1.0))
    _, moved = gradient(separate_outer(params=labelled, inner_params=optax.sgd(2.0)))
    assert not moved.params["w1"].any()
    np.testing.assert_allclose(moved.params["w2"], 0.1 * (plain.params["w2"] + 0.5 * before.params["w2"]), atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=1e-4, atol=1e-7), *(moved[1], plain[1]))


def test_the_optimizer_of_the_parameters_gets_the_loss_and_their_gradient_by_name():
    seen = []

    def update(grads, state, params=None, *, value, grad):
        seen.append(jax.tree.structure(grad))
        return jax.tree.map(lambda leaf: 0 * leaf + value, grad), state

    by_name = optax.GradientTransformationExtraArgs(lambda params: (), update)
    loss_fn, params = plain_dict()
    outer = separate_outer(params=by_name, inner_params=optax.keep_params_nonnegative())
    outer = optax.chain(optax.clip_by_global_norm(1.0), outer)  # A chain passes all arguments by name.
    learner = maml_jax.maml(loss_fn, maml_jax.sgd(0.1, steps=1, learn_rates="layer"), outer)
    after, info = jax.jit(learner.step)(learner.init(params), tasks(1))
    assert seen == [jax.tree.structure(params)]
    np.testing.assert_allclose(after.params["b1"] - params["b1"], info.loss, rtol=1e-5)


def test_wrong_arguments_raise():
    loss_fn, params = plain_dict()
    outer = separate_outer(params=optax.sgd(0.1), inner_params=optax.sgd(0.1))
    with pytest.raises(ValueError, match="inner learner with learned parameters"):
        maml_jax.maml(loss_fn, maml_jax.sgd(0.1, steps=1), outer).init(params)
    with pytest.raises(TypeError, match="inner_params must be an optax transformation"):
        separate_outer(params=optax.sgd(0.1), inner_params=0.1)
