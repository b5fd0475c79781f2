"""ProMP lowers the loss, and the clip bounds the decrease."""

import jax
import numpy as np
import optax
from helpers.rl_cases import (
    ENVIRONMENT,
    INNER,
    POLICY,
    collected,
    compiled,
    direction_like,
    perturbed,
    small_learner,
)

from maml_jax.rl.meta_rl import draw_task_batch
from maml_jax.rl.outer import promp
from maml_jax.types import MetaParams


def test_promp_lowers_the_loss_in_several_steps():
    learner = small_learner(promp(optax.adam(1e-2), steps=3), inner_loss_name="lvc")
    state = learner.init(perturbed(POLICY))
    after, info = compiled(learner.step)(state, draw_task_batch(ENVIRONMENT, jax.random.key(1), 4))
    assert info.aux["improvement"][0] > 0 and 0 < info.aux["kl"][0] < 1 and info.grad_norm > 0
    assert int(after.step) == 1


def test_the_clip_of_promp_bounds_the_gain(x64):
    params = perturbed(POLICY)
    loss = compiled(collected(INNER, params).loss, static_argnums=1)
    meta_params = MetaParams(params, ())
    far = optax.tree.add_scale(meta_params, 0.5, direction_like(meta_params))
    assert loss(far, 0.1)[0] > loss(far)[0]
    np.testing.assert_allclose(loss(meta_params, 0.1)[0], loss(meta_params)[0], atol=1e-12)
