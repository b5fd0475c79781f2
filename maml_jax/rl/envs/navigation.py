"""A point that is to walk to a goal it does not see (paper, section 5.3, '2D navigation').

As in the authors' code, with what the paper says otherwise: the reward is minus the distance, not its
square, and an episode ends when both coordinates are within .01 of the goal.
"""

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax import validation
from maml_jax.rl.environment import Environment, Step

GOALS = (-0.5, 0.5)
"""Range of either coordinate of a goal."""
STRIDE = 0.1
"""The longest step along either coordinate."""
NEAR = 0.01


def navigation(horizon: int = 100) -> Environment:
    """The environment: task and state are points `[2]`, every episode starts at the origin.

    Raises:
      ValueError: for a horizon below 1.
    """
    validation.at_least("horizon", horizon, 1)

    def sample_tasks(key: jax.Array, count: int) -> jax.Array:
        return jax.random.uniform(key, (count, 2), minval=GOALS[0], maxval=GOALS[1])

    def step(state: jax.Array, action: jax.Array, task: jax.Array) -> Step:
        state = state + STRIDE * action
        away = state - task
        # The square root has no derivative at 0, but nothing is differentiated through an environment.
        return Step(state, -jnp.sqrt(jnp.square(away).sum()), (jnp.abs(away) < NEAR).all())

    return Environment(
        name="navigation",
        observation_size=2,
        action_size=2,
        horizon=horizon,
        sample_tasks=sample_tasks,
        check_tasks=check_goals,
        reset=lambda key, task: jnp.zeros_like(task),
        observe=lambda state, task: state,
        step=step,
    )


def check_goals(tasks: object) -> None:
    """Raises ValueError unless `tasks` is `[T, 2]` within the range of goals."""
    goals = np.asarray(tasks)
    if goals.ndim != 2 or goals.shape[1] != 2 or not ((goals >= GOALS[0]) & (goals <= GOALS[1])).all():
        raise ValueError(
            f"The tasks of navigation are goals [T, 2] with coordinates from {GOALS[0]} to {GOALS[1]}, but got "
            f"{goals.tolist()}."
        )
