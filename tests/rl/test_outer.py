"""The policy gradient and ProMP equal loops of the optimizer, and the clip of ProMP bounds the decrease."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
from helpers.rl_cases import (
    INNER,
    POLICY,
    collected,
    compiled,
    direction_like,
    perturbed,
)

from maml_jax.rl.outer import policy_gradient, promp
from maml_jax.types import MetaParams

ADAM = optax.adam(0.01, eps=0.1)


def policy_gradient_loss(objective, meta_params):
    loss, divergences = objective.loss(meta_params)
    return loss, divergences.kl


def promp_loss(objective, meta_params):
    loss, divergences = objective.loss(meta_params, 0.2)
    return loss + 0.5 * divergences.inner_kl, divergences.kl


@pytest.mark.parametrize(
    ("outer", "loss", "steps"),
    [
        (policy_gradient(ADAM), policy_gradient_loss, 1),
        (promp(ADAM, steps=2, clip=0.2, inner_kl_weight=0.5), promp_loss, 2),
    ],
    ids=["policy gradient", "promp"],
)
def test_steps_equal_a_loop_of_the_optimizer_and_report_their_effect(x64, outer, loss, steps):
    params = perturbed(POLICY)
    objective, meta_params = collected(INNER, params), MetaParams(params, ())
    new, _, info = compiled(partial(outer.update, objective))(meta_params, outer.init(meta_params))
    differentiated = compiled(jax.value_and_grad(partial(loss, objective), has_aux=True))
    at, opt_state = meta_params, ADAM.init(meta_params)
    (before, _), first = differentiated(meta_params)
    gradient = first
    for _ in range(steps):
        updates, opt_state = ADAM.update(gradient, opt_state)
        at = optax.apply_updates(at, updates)
        (value, kl), gradient = differentiated(at)
    for one, two in zip(*map(jax.tree.leaves, (new, at))):
        np.testing.assert_allclose(one, two, atol=1e-12)
    np.testing.assert_allclose(info, (optax.tree.norm(first), before - value, kl), rtol=1e-7)
    assert info.improvement > 0


def test_the_clip_of_promp_bounds_the_gain(x64):
    params = perturbed(POLICY)
    loss = compiled(collected(INNER, params).loss, static_argnums=1)
    meta_params = MetaParams(params, ())
    far = optax.tree.add_scale(meta_params, 0.5, direction_like(meta_params))
    assert loss(far, 0.1)[0] > loss(far)[0]
    np.testing.assert_allclose(loss(meta_params, 0.1)[0], loss(meta_params)[0], atol=1e-12)
