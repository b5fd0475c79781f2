"""What changes in the course of meta-training, beside the rates, for which optax has schedules."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from maml_jax import validation
from maml_jax.meta import MetaLearner
from maml_jax.types import MetaInfo, MetaState, Task


def multi_step_weights(steps: int, until: int) -> Callable[[jax.Array], jax.Array]:
    """Weights of the multi-step loss, annealed: equal after every inner step at first, the last alone in the end.

    Args:
      steps: inner steps, S.
      until: the meta-step from which on only the loss after the last inner step counts. Until then the
        others' weights fall linearly from 1 / S (Antoniou et al. 2019, section 4).

    Returns:
      For `step_weights` of `maml`: a function from the meta-step to `[S + 1]` weights that add up to 1.
    """
    validation.at_least("steps", steps, 1)
    validation.at_least("until", until, 1)

    def weights(step: jax.Array) -> jax.Array:
        others = jnp.clip(1 - step / until, 0) / steps
        return jnp.full(steps + 1, others).at[0].set(0).at[-1].set(1 - (steps - 1) * others)

    return weights


def switch_learner(first: MetaLearner, then: MetaLearner, *, after: int) -> MetaLearner:
    """`first` until so many meta-steps are taken, `then` from there on, as one learner.

    First order before second is the annealed derivative order of MAML++ (Antoniou et al. 2019, section 4).
    Both must have the same parameters, rates and outer optimizer; evaluation and adaptation are those of `then`.
    """
    validation.at_least("after", after, 1)

    def step(state: MetaState, tasks: Task) -> tuple[MetaState, MetaInfo]:
        return jax.lax.cond(state.step < after, first.step, then.step, state, tasks)

    return then._replace(step=step)
