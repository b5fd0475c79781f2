"""2D navigation: a point moves in the plane to a goal that it does not observe (Finn et al. 2017, section 5.3).

Rewards and ends of episodes are those of the code of Finn et al. The code differs from the paper: the reward is minus
the distance, not its square, and an episode ends when both coordinates are within 0.01 of the goal.
"""

import jax
import jax.numpy as jnp

from maml_jax import validation
from maml_jax.rl.environment import Environment, Step

GOALS = (-0.5, 0.5)
"""Range of both coordinates of a goal."""
MAX_STEP = 0.1
"""The longest move along a coordinate in one time step."""
GOAL_RADIUS = 0.01
"""An episode ends when both coordinates are closer to the goal than this distance."""


def navigation(horizon: int = 100) -> Environment:
    """2D navigation. Tasks (goals) and states (positions) are points `[2]`; episodes start at the origin.

    Example:
      >>> import jax
      >>> environment = navigation()
      >>> goal = jax.numpy.array([0.3, 0.0])
      >>> position = environment.reset(jax.random.key(0), goal)
      >>> step = environment.step(position, jax.numpy.array([1.0, 0.0]), goal)
      >>> print(f"{step.reward:.2f}")  # Minus the distance to the goal.
      -0.20

    Args:
      horizon: `H`, time steps of an episode.

    Raises:
      ValueError: for a horizon below 1.

    References:
      Finn, Abbeel and Levine 2017, arXiv:1703.03400, section 5.3.
    """
    validation.at_least("horizon", horizon, 1)

    def sample_tasks(key: jax.Array, count: int) -> jax.Array:
        return jax.random.uniform(key, (count, 2), minval=GOALS[0], maxval=GOALS[1])

    def step(state: jax.Array, action: jax.Array, task: jax.Array) -> Step:
        state = state + MAX_STEP * action
        offset = state - task
        # The square root has no derivative at 0, but environments are not differentiated.
        return Step(state, -jnp.sqrt(jnp.square(offset).sum()), (jnp.abs(offset) < GOAL_RADIUS).all())

    return Environment(
        name="navigation",
        observation_size=2,
        action_size=2,
        horizon=horizon,
        sample_tasks=sample_tasks,
        reset=lambda key, task: jnp.zeros_like(task),
        observe=lambda state, task: state,
        step=step,
    )
