"""The linear feature baseline: a prediction of the return from the observation and the time step."""

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve

RIDGE = 1e-5
"""Weight of the ridge penalty, for feature columns of unit length."""


def features(observation: jax.Array, time: jax.Array) -> jax.Array:
    """Computes the features of the baseline at time steps `[H]` or `[E, H]`, `[E, H, O] -> [E, H, 2 O + 4]`.

    The features are the observation clipped to [-10, 10], its square, the time (in units of 100 steps) to the
    powers 1 to 3, and 1.
    """
    observation = jnp.clip(observation, -10, 10)
    time = time[..., None].astype(observation.dtype) / 100
    time = jnp.concatenate([time, time**2, time**3, jnp.ones_like(time)], -1)
    time = jnp.broadcast_to(time, (*observation.shape[:-1], 4))
    return jnp.concatenate([observation, observation**2, time], -1)


def linear_baseline(observation: jax.Array, returns: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Fits returns by ridge regression.

    The feature columns are first scaled to unit length. Some of the half-cheetah's observations are collinear.
    Without the scaling, the float32 Cholesky factorisation fails.

    Args:
      observation: `[E, H, O]`.
      returns: `[E, H]`.
      mask: `[E, H]`: 1 for the time steps of an episode, 0 for the time steps after the end.

    Returns:
      The predictions `[E, H]`, 0 where the mask is 0; and the weights `[2 O + 4]` of the features.

    References:
      Duan et al. 2016, arXiv:1604.06778.
    """
    # Scale the feature columns.
    design = features(observation, jnp.arange(observation.shape[1])) * mask[..., None]
    design = design.reshape(-1, design.shape[-1])
    length = jnp.sqrt(jnp.square(design).sum(0))
    length = jnp.where(length > 0, length, 1)
    design = design / length
    # Solve the normal equations of ridge regression.
    gram = design.T @ design + RIDGE * jnp.eye(design.shape[1], dtype=design.dtype)
    weights = cho_solve(cho_factor(gram), design.T @ (mask * returns).reshape(-1))
    return (design @ weights).reshape(returns.shape), weights / length
