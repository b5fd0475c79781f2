"""Gaussian policies: densities, divergences, initial values, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm

from maml_jax.rl.policy import MIN_LOG_STD, Gaussian, gaussian_mlp


def test_log_probability_and_divergence_equal_references(x64):
    one = Gaussian(jnp.array([0.3, -0.2]), jnp.array([0.1, -0.4]))
    other = Gaussian(jnp.array([0.1, 0.5]), jnp.array([-0.3, 0.2]))
    action = jnp.array([0.7, 0.4])
    np.testing.assert_allclose(one.log_prob(action), norm.logpdf(action, one.mean, jnp.exp(one.log_std)).sum())
    ratio = jnp.exp(one.log_std - other.log_std)
    divergence = ratio**2 + ((one.mean - other.mean) / jnp.exp(other.log_std)) ** 2 - 1 - 2 * jnp.log(ratio)
    np.testing.assert_allclose(one.kl_to(other), 0.5 * divergence.sum(), rtol=1e-12)
    assert one.kl_to(one) == 0


def test_the_deviation_starts_at_1_and_has_a_floor():
    policy = gaussian_mlp(3, 2)
    params = policy.init(jax.random.key(0))
    assert [params[f"Dense_{layer}"]["kernel"].shape for layer in range(3)] == [(3, 100), (100, 100), (100, 2)]
    distribution = policy.apply(params, jnp.ones((7, 3)))
    assert distribution.mean.shape == (7, 2) and (distribution.log_std == 0).all()
    low = policy.apply({**params, "log_std": jnp.full(2, -100.0)}, jnp.ones((7, 3)))
    np.testing.assert_allclose(low.log_std, MIN_LOG_STD)


def test_a_size_below_1_raises():
    with pytest.raises(ValueError, match="hidden must be an integer of at least 1, but got 0"):
        gaussian_mlp(2, 2, hidden=(0,))
