"""Sine curves to regress from a few points (paper, section 5.1), drawn on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maml_jax.types import Task

AMPLITUDES = (0.1, 5.0)
PHASES = (0.0, jnp.pi)
INPUTS = (-5.0, 5.0)


class Curves(NamedTuple):
    """Sine curves `amplitude * sin(x - phase)`; fields have shape `[T]`."""

    amplitude: jax.Array
    phase: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """Values at `x`, `[T, B, 1]` or `[B, 1]`, as `[T, B, 1]`."""
        return self.amplitude[:, None, None] * jnp.sin(x - self.phase[:, None, None])


def draw_curves(key: jax.Array, tasks: int) -> Curves:
    """Draws `tasks` curves with amplitude and phase uniform in the paper's ranges."""
    amplitude_key, phase_key = jax.random.split(key)
    return Curves(
        jax.random.uniform(amplitude_key, (tasks,), minval=AMPLITUDES[0], maxval=AMPLITUDES[1]),
        jax.random.uniform(phase_key, (tasks,), minval=PHASES[0], maxval=PHASES[1]),
    )


def draw_examples(key: jax.Array, curves: Curves, *, shots: int, queries: int, reveal: bool = False) -> Task:
    """Draws points of each curve, uniform in [-5, 5].

    Args:
      key: a PRNG key.
      curves: `T` curves.
      shots: support examples per task.
      queries: query examples per task.
      reveal: also give amplitude and phase as inputs, for the oracle of the paper.

    Returns:
      Tasks of `(x [T, B, 1], y [T, B, 1])`, or `x [T, B, 3]` with `reveal`.
    """
    tasks = curves.amplitude.shape[0]
    x = jax.random.uniform(key, (tasks, shots + queries, 1), minval=INPUTS[0], maxval=INPUTS[1])
    y = curves(x)
    if reveal:
        hidden = jnp.stack(curves, -1)[:, None, :]
        x = jnp.concatenate([x, jnp.broadcast_to(hidden, (tasks, shots + queries, 2))], -1)
    return Task((x[:, :shots], y[:, :shots]), (x[:, shots:], y[:, shots:]))


def draw_tasks(key: jax.Array, tasks: int, *, shots: int, queries: int, reveal: bool = False) -> Task:
    """Draws a meta-batch: new curves and new points of them. Arguments as in `draw_examples`."""
    curve_key, example_key = jax.random.split(key)
    return draw_examples(example_key, draw_curves(curve_key, tasks), shots=shots, queries=queries, reveal=reveal)
