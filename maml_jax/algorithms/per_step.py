"""Parameters that exist once for every inner step, as the normalisation of MAML++ (Antoniou et al. 2019, section 4).

params = per_step.replicate_per_step(params, models.norms_only(params), steps=5)
inner = maml_jax.sgd(0.05, steps=5, trainable=..., params_at_step=per_step.select_step(models.norms_only))
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maml_jax import validation
from maml_jax.inner import ParamsAtStep
from maml_jax.types import Params


def replicate_per_step(params: Params, mask: Any, steps: int) -> Params:
    """The parameters with `steps + 1` equal copies, along a new first axis, of those where `mask` is True.

    Copy i is for the loss after i inner steps; more steps than that take the last.
    """
    validation.at_least("steps", steps, 1)
    return jax.tree.map(lambda leaf, many: jnp.stack([leaf] * (steps + 1)) if many else leaf, params, mask)


def select_step(mask: Callable[[Params], Any]) -> ParamsAtStep:
    """For `params_at_step=`: of every parameter where `mask(params)` is True, the copy of the inner step."""

    def params_at_step(params: Params, step: jax.Array) -> Params:
        return jax.tree.map(
            lambda leaf, many: leaf[jnp.minimum(step, len(leaf) - 1)] if many else leaf, params, mask(params)
        )

    return params_at_step
