"""Second derivatives of the inner losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rl_cases import POLICY, compiled
from jax.flatten_util import ravel_pytree

from maml_jax.rl.advantage import Experience
from maml_jax.rl.losses import SURROGATES, clipped_ratio, inner_loss
from maml_jax.rl.rollout import Episodes

ENDS = ("nonfinite", "terminated", "last_observation")


def test_hessians_differ_by_the_known_terms(x64, objective_of_two_steps):
    """'lvc' adds E[A grad log pi (grad log pi)'] to the Hessian of 'logp'. 'dice' adds the terms of earlier steps."""
    params, objective = objective_of_two_steps
    sampled = jax.tree.map(lambda leaf: leaf[0, 0], objective.tasks.support)
    flat, unravel = ravel_pytree(params)
    count = sampled.episodes.mask.sum()
    advantage_to_go = jnp.cumsum(sampled.reward[:, ::-1], 1)[:, ::-1] - sampled.baseline

    def log_prob(flat):
        return sampled.log_prob_under(POLICY.apply(unravel(flat), sampled.episodes.observation))

    @compiled
    def derivatives(flat):
        losses = [lambda flat, n=name: inner_loss(POLICY, n)(unravel(flat), sampled)[0] for name in SURROGATES]
        plain = jax.hessian(lambda flat: -(advantage_to_go * log_prob(flat)).sum() / count)(flat)
        scores = jax.jacobian(log_prob)(flat)
        return scores, plain, [jax.grad(loss)(flat) for loss in losses], [jax.hessian(loss)(flat) for loss in losses]

    assert tuple(SURROGATES) == ("logp", "lvc", "dice")
    scores, plain, gradients, hessians = derivatives(flat)
    products = jnp.einsum("ehi,ehj->ehij", scores, scores)
    np.testing.assert_allclose(gradients[1], gradients[0], atol=1e-12)
    added = -jnp.einsum("eh,ehij->ij", sampled.advantage, products) / count
    np.testing.assert_allclose(hessians[1] - hessians[0], added, atol=1e-9)
    np.testing.assert_allclose(gradients[2], -jnp.einsum("eh,ehi->i", advantage_to_go, scores) / count, atol=1e-12)
    past = jnp.cumsum(scores, 1)
    added = jnp.einsum("eh,ehi,ehj->ij", sampled.reward, past, past)
    added = -(added - jnp.einsum("eh,ehij->ij", sampled.baseline, products)) / count
    np.testing.assert_allclose(hessians[2] - plain, added, atol=1e-9)


def test_ratios_outside_the_clip_do_not_lower_the_loss():
    mask = jnp.array([[1.0, 1.0, 1.0, 0.0]] * 2)
    episodes = Episodes(*[jnp.zeros((2, 4))] * 3, reward=mask, mask=mask, **dict.fromkeys(ENDS, jnp.zeros(2)))
    advantage = jnp.array([[1.0] * 4, [-1.0] * 4])
    sampled = Experience(episodes, jnp.full((2, 4), -0.5), advantage, mask, mask)
    log_prob = jnp.log(jnp.array([[0.5, 1.1, 2.0, 9.0]] * 2)) - 0.5
    expected = -np.mean([0.5, 1.1, 1.3, -0.7, -1.1, -2.0])
    np.testing.assert_allclose(clipped_ratio(sampled, log_prob, 0.3), expected, rtol=1e-5)
    np.testing.assert_allclose(SURROGATES["lvc"](sampled, log_prob), 0, atol=1e-6)


def test_an_unknown_name_raises():
    with pytest.raises(ValueError, match="inner_loss must be one of 'logp', 'lvc', 'dice', but got 'reinforce'"):
        inner_loss(POLICY, "reinforce")
