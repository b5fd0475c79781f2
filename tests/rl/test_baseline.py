"""The linear baseline equals a solution by least squares."""

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax.rl.baseline import RIDGE, features, linear_baseline


def test_features_are_clipped_observations_squares_and_powers_of_time():
    observation = np.full((2, 150, 2), [12.0, -3.0], np.float32)
    found = features(jnp.asarray(observation), jnp.arange(150))
    assert found.shape == (2, 150, 8)
    for time in (0, 149):
        expected = [10, -3, 100, 9, time / 100, (time / 100) ** 2, (time / 100) ** 3, 1]
        np.testing.assert_allclose(found[1, time], expected, rtol=1e-6)
        alone = features(jnp.asarray(observation[:, :1]), jnp.full((2, 1), time))
        np.testing.assert_allclose(alone[1, 0], expected, rtol=1e-6)


def test_float32_predictions_equal_ridge_regression_in_float64():
    """The observations are collinear, like those of the half-cheetah."""
    rng = np.random.default_rng(0)
    observation = rng.normal(size=(10, 50, 3)).astype(np.float32)
    observation = np.concatenate([observation, observation[..., :1] * 2, observation[..., 1:] - 1], -1)
    mask = (np.arange(50) < rng.integers(20, 51, size=(10, 1))).astype(np.float32)
    returns = (observation.sum(-1) + 5 * np.cos(np.arange(50) / 20) + rng.normal(size=(10, 50))).astype(np.float32)
    predicted, weights = jax.jit(linear_baseline)(observation, returns, mask)
    from_weights = mask * (features(jnp.asarray(observation), jnp.arange(50)) @ weights)
    np.testing.assert_allclose(from_weights, predicted, atol=1e-4 * returns.std())
    predicted = np.asarray(predicted, np.float64)

    valid = mask > 0
    with jax.enable_x64(True):
        design = np.asarray(features(jnp.asarray(observation, jnp.float64), jnp.arange(50)))[valid]
    design = design / np.linalg.norm(design, axis=0)
    ridge = np.sqrt(RIDGE) * np.eye(design.shape[1])
    stacked = np.concatenate([design, ridge]), np.concatenate([returns[valid], np.zeros(design.shape[1])])
    expected = design @ np.linalg.lstsq(*stacked, rcond=None)[0]
    np.testing.assert_allclose(predicted[valid], expected, atol=2e-3 * returns.std())
    free = design @ np.linalg.lstsq(design, returns[valid], rcond=None)[0]  # The ridge penalty changes little.
    np.testing.assert_allclose(expected, free, atol=0.06 * returns.std())
