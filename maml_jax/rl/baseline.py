"""A linear baseline: what return is to be expected at a step, from the observation and the time (Duan et al. 2016)."""

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve

RIDGE = 1e-5


def features(observation: jax.Array) -> jax.Array:
    """`[E, H, O] -> [E, H, 2 O + 4]`: the observation cut off to [-10, 10], its squares, the time to the third, 1."""
    episodes, horizon, _ = observation.shape
    observation = jnp.clip(observation, -10, 10)
    time = jnp.arange(horizon, dtype=observation.dtype)[:, None] / 100
    time = jnp.concatenate([time, time**2, time**3, jnp.ones_like(time)], 1)
    return jnp.concatenate([observation, observation**2, jnp.broadcast_to(time, (episodes, *time.shape))], -1)


def linear_baseline(observation: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """Fits returns `[E, H]` by ridge regression over the steps that happened, and predicts them; 0 for the others.

    Columns are scaled to unit length first: of the cheetah's observations some depend on others, and
    without the scaling the float32 factorisation does not exist. The ridge is relative to that length.
    """
    design = features(observation) * mask[..., None]
    design = design.reshape(-1, design.shape[-1])
    length = jnp.sqrt(jnp.square(design).sum(0))
    design = design / jnp.where(length > 0, length, 1)
    gram = design.T @ design + RIDGE * jnp.eye(design.shape[1], dtype=design.dtype)
    weights = cho_solve(cho_factor(gram), design.T @ (mask * returns).reshape(-1))
    return (design @ weights).reshape(returns.shape)
