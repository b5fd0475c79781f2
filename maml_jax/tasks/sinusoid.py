"""Regression of sine curves from a few points (Finn et al. 2017, section 5.1), drawn on the device.

References:
  Finn, Abbeel and Levine (2017), Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, arXiv:1703.03400.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maml_jax.types import Task

AMPLITUDES = (0.1, 5.0)
"""Range of the amplitude."""
PHASES = (0.0, jnp.pi)
"""Range of the phase, in radians."""
INPUTS = (-5.0, 5.0)
"""Range of the inputs."""


class Curves(NamedTuple):
    """Sine curves `amplitude * sin(x - phase)`; both fields have shape `[T]`."""

    amplitude: jax.Array
    phase: jax.Array
    """Radians."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Evaluates the curves at `x`, `[T, B, 1]` or `[B, 1]`; returns `[T, B, 1]`."""
        return self.amplitude[:, None, None] * jnp.sin(x - self.phase[:, None, None])


def draw_curves(key: jax.Array, num_tasks: int) -> Curves:
    """Draws `num_tasks` curves, with amplitudes uniform in [0.1, 5] and phases uniform in [0, pi] radians."""
    amplitude_key, phase_key = jax.random.split(key)
    return Curves(
        jax.random.uniform(amplitude_key, (num_tasks,), minval=AMPLITUDES[0], maxval=AMPLITUDES[1]),
        jax.random.uniform(phase_key, (num_tasks,), minval=PHASES[0], maxval=PHASES[1]),
    )


def draw_examples(key: jax.Array, curves: Curves, *, shots: int, queries: int, reveal: bool = False) -> Task:
    """Draws points of each curve, uniform in [-5, 5].

    Args:
      key: a PRNG key.
      curves: `T` curves.
      shots: support points per curve, `K`.
      queries: query points per curve, `Q`.
      reveal: whether the inputs also hold amplitude and phase, as for the oracle of the paper.

    Returns:
      Tasks with support `(x [T, K, 1], y [T, K, 1])` and query `(x [T, Q, 1], y [T, Q, 1])`. With `reveal` the inputs
      are `[T, K, 3]` and `[T, Q, 3]`.
    """
    num_tasks = curves.amplitude.shape[0]
    x = jax.random.uniform(key, (num_tasks, shots + queries, 1), minval=INPUTS[0], maxval=INPUTS[1])
    y = curves(x)
    if reveal:
        hidden = jnp.stack(curves, -1)[:, None, :]
        x = jnp.concatenate([x, jnp.broadcast_to(hidden, (num_tasks, shots + queries, 2))], -1)
    return Task((x[:, :shots], y[:, :shots]), (x[:, shots:], y[:, shots:]))


def draw_tasks(key: jax.Array, num_tasks: int, *, shots: int, queries: int, reveal: bool = False) -> Task:
    """Draws a meta-batch of new curves, with new points of each curve.

    Args:
      key: a PRNG key.
      num_tasks: curves in the meta-batch, `T`.
      shots: support points per curve, `K`.
      queries: query points per curve, `Q`.
      reveal: whether the inputs also hold amplitude and phase.

    Returns:
      Tasks as from `draw_examples`.

    Example:
      >>> import jax
      >>> tasks = draw_tasks(jax.random.key(0), 25, shots=5, queries=10)
      >>> x, y = tasks.support
      >>> x.shape, y.shape, tasks.query[0].shape
      ((25, 5, 1), (25, 5, 1), (25, 10, 1))
    """
    curve_key, example_key = jax.random.split(key)
    return draw_examples(example_key, draw_curves(curve_key, num_tasks), shots=shots, queries=queries, reveal=reveal)
