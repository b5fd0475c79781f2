"""Sine curves have the distribution of the paper."""

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax.tasks import sinusoid


def test_curves_and_points_have_the_distribution_of_the_paper():
    tasks = sinusoid.draw_tasks(jax.random.key(0), 2000, shots=5, queries=3, reveal=True)
    (x, y), (x_query, y_query) = tasks
    assert x.shape == (2000, 5, 3) and y_query.shape == (2000, 3, 1)
    amplitude, phase = x[..., 1:2], x[..., 2:3]
    np.testing.assert_allclose(y, amplitude * np.sin(x[..., :1] - phase), atol=1e-5)
    np.testing.assert_array_equal(x[:, 0, 1:], x_query[:, 0, 1:])
    for values, low, high in ((amplitude, 0.1, 5), (phase, 0, np.pi), (x[..., :1], -5, 5)):
        assert low <= values.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < values.max() <= high
        assert np.isclose(values.mean(), (low + high) / 2, atol=0.05 * (high - low))
    hidden = sinusoid.draw_tasks(jax.random.key(0), 2000, shots=5, queries=3)
    np.testing.assert_array_equal(hidden.support[0], x[..., :1])
    assert jnp.array_equal(hidden.query[1], y_query)
