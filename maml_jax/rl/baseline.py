"""The linear feature baseline: a prediction of the return from the observation and the time step."""

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve

RIDGE = 1e-5
"""Weight of the ridge penalty, for feature columns of unit length."""


def features(observation: jax.Array) -> jax.Array:
    """Computes the features of the baseline, `[E, H, O] -> [E, H, 2 O + 4]`.

    The features are the observation clipped to [-10, 10], its square, the time (in units of 100 steps) to the
    powers 1 to 3, and 1.
    """
    episodes, horizon, _ = observation.shape
    observation = jnp.clip(observation, -10, 10)
    time = jnp.arange(horizon, dtype=observation.dtype)[:, None] / 100
    time = jnp.concatenate([time, time**2, time**3, jnp.ones_like(time)], 1)
    return jnp.concatenate([observation, observation**2, jnp.broadcast_to(time, (episodes, *time.shape))], -1)


def linear_baseline(observation: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """Fits returns by ridge regression, and returns the predictions of the fit.

    The feature columns are first scaled to unit length. Some of the half-cheetah's observations are collinear.
    Without the scaling, the float32 Cholesky factorisation fails.

    Args:
      observation: `[E, H, O]`.
      returns: `[E, H]`.
      mask: `[E, H]`: 1 for the time steps of an episode, 0 for the time steps after the end.

    Returns:
      The predictions `[E, H]`, 0 where the mask is 0.

    References:
      Duan et al. 2016, arXiv:1604.06778.
    """
    # Scale the feature columns.
    design = features(observation) * mask[..., None]
    design = design.reshape(-1, design.shape[-1])
    length = jnp.sqrt(jnp.square(design).sum(0))
    design = design / jnp.where(length > 0, length, 1)
    # Solve the normal equations of ridge regression.
    gram = design.T @ design + RIDGE * jnp.eye(design.shape[1], dtype=design.dtype)
    weights = cho_solve(cho_factor(gram), design.T @ (mask * returns).reshape(-1))
    return (design @ weights).reshape(returns.shape)
