"""Policies: densities, divergences, samples, initial values, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm

from maml_jax.rl.policy import MIN_LOG_STD, Categorical, Gaussian, categorical_mlp, gaussian_mlp


def test_log_probability_and_divergence_equal_references(x64):
    one = Gaussian(jnp.array([0.3, -0.2]), jnp.array([0.1, -0.4]))
    other = Gaussian(jnp.array([0.1, 0.5]), jnp.array([-0.3, 0.2]))
    action = jnp.array([0.7, 0.4])
    np.testing.assert_allclose(one.log_prob(action), norm.logpdf(action, one.mean, jnp.exp(one.log_std)).sum())
    ratio = jnp.exp(one.log_std - other.log_std)
    divergence = ratio**2 + ((one.mean - other.mean) / jnp.exp(other.log_std)) ** 2 - 1 - 2 * jnp.log(ratio)
    np.testing.assert_allclose(one.kl_to(other), 0.5 * divergence.sum(), rtol=1e-12)
    assert one.kl_to(one) == 0


def test_categorical_probabilities_samples_and_divergence_equal_references(x64):
    one, other = (Categorical(jnp.array(logits)) for logits in ([0.3, -1.2, 2.0], [1.0, 0.5, -0.7]))
    probabilities, others = (np.exp(each.logits) / np.exp(each.logits).sum() for each in (one, other))
    np.testing.assert_allclose(one.log_prob(jnp.eye(3)), np.log(probabilities), rtol=1e-12)
    divergence = (probabilities * np.log(probabilities / others)).sum()
    np.testing.assert_allclose(one.kl_to(other), divergence, rtol=1e-12)
    assert one.kl_to(one) == 0
    actions = one.sample(one.noise(jax.random.key(0), (20_000, 3), jnp.float64))
    assert set(np.unique(actions)) == {0, 1} and (actions.sum(1) == 1).all()
    np.testing.assert_allclose(actions.mean(0), probabilities, atol=0.01)
    assert np.isnan(Categorical(jnp.array([0.0, jnp.nan])).sample(jnp.zeros(2))).all()  # `rollout` ends the episode.


def test_initial_values_are_the_papers_and_the_deviation_has_a_floor():
    policy = gaussian_mlp(3, 2)
    params = policy.init(jax.random.key(0))
    assert [params[f"Dense_{layer}"]["kernel"].shape for layer in range(3)] == [(3, 100), (100, 100), (100, 2)]
    for layer, largest in enumerate(np.sqrt([6 / 103, 6 / 200, 6 / 102])):  # Xavier's uniform distribution.
        assert 0.9 * largest < jnp.abs(params[f"Dense_{layer}"]["kernel"]).max() <= largest
        assert (params[f"Dense_{layer}"]["bias"] == 0).all()
    distribution = policy.apply(params, jnp.ones((7, 3)))
    assert distribution.mean.shape == (7, 2) and (distribution.log_std == 0).all()
    low = policy.apply({**params, "log_std": jnp.full(2, -100.0)}, jnp.ones((7, 3)))
    np.testing.assert_allclose(low.log_std, MIN_LOG_STD)


def test_a_size_below_1_raises():
    with pytest.raises(ValueError, match="hidden must be an integer of at least 1, but got 0"):
        gaussian_mlp(2, 2, hidden=(0,))
    with pytest.raises(ValueError, match="actions must be an integer of at least 1, but got 0"):
        categorical_mlp(2, 0)
