"""Outer steps: updates of the meta-parameters from the outer objective.

This module has the policy gradient and ProMP. `maml_jax.rl.trust_region` has TRPO.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import optax
from jax import lax

from maml_jax import inner, validation
from maml_jax.rl.objective import Objective
from maml_jax.types import MetaParams


class OuterInfo(NamedTuple):
    """Metrics of one outer step; scalars."""

    grad_norm: jax.Array
    """Global norm of the meta-gradient before the step."""
    improvement: jax.Array
    """Decrease of the loss on the same episodes."""
    kl: jax.Array
    """KL divergence from the adapted policies before the step to the adapted policies after the step."""


class Outer(NamedTuple):
    """An outer step, made by `trust_region.trpo`, `policy_gradient` or `promp`."""

    init: Callable[[MetaParams], Any]
    """`meta_params -> opt_state`."""
    update: Callable[[Objective, MetaParams, Any], tuple[MetaParams, Any, OuterInfo]]
    """`(objective, meta_params, opt_state) -> (meta_params, opt_state, info)`."""


def policy_gradient(optimizer: optax.GradientTransformation) -> Outer:
    """One step of an optax optimizer along the gradient of the objective, the 'vanilla' policy gradient.

    Example:
      >>> import optax
      >>> outer = policy_gradient(optax.adam(1e-3))

    Args:
      optimizer: an optax transformation that includes the learning rate.

    Raises:
      TypeError: if `optimizer` is not an optax transformation.

    References:
      Finn, Abbeel and Levine 2017, arXiv:1703.03400, algorithm 3.
    """
    return _descent(optimizer, lambda objective, meta_params: objective.loss(meta_params)[0], steps=1)


def promp(
    optimizer: optax.GradientTransformation, *, steps: int = 5, clip: float = 0.3, inner_kl_weight: float = 5e-4
) -> Outer:
    """Proximal meta-policy search (ProMP): several optimizer steps on the same episodes, with clipped ratios.

    Rothfuss et al. use ProMP with the inner loss 'lvc'.

    Example:
      >>> import optax
      >>> outer = promp(optax.adam(1e-3), steps=5)

    Args:
      optimizer: an optax transformation that includes the learning rate.
      steps: optimizer steps on each meta-batch.
      clip: likelihood ratios outside 1 +- clip do not lower the loss.
      inner_kl_weight: weight of the penalty `Divergences.inner_kl`, the KL divergence of the policies before each
        inner step.

    Raises:
      TypeError: if `optimizer` is not an optax transformation.
      ValueError: for fewer than 1 step, and for a clip or weight that is not positive.

    References:
      Rothfuss et al. 2019, arXiv:1810.06784, algorithm 1.
    """
    validation.at_least("steps", steps, 1)
    validation.positive("clip", clip)
    validation.positive("inner_kl_weight", inner_kl_weight)

    def loss(objective: Objective, meta_params: MetaParams) -> jax.Array:
        value, divergences = objective.loss(meta_params, clip)
        return value + inner_kl_weight * divergences.inner_kl

    return _descent(optimizer, loss, steps)


def _descent(
    optimizer: optax.GradientTransformation, loss: Callable[[Objective, MetaParams], jax.Array], steps: int
) -> Outer:
    validation.transformation("optimizer", optimizer)

    def update(objective: Objective, meta_params: MetaParams, opt_state: Any) -> tuple[MetaParams, Any, OuterInfo]:
        def step(carry: Any, _: None) -> Any:
            meta_params, opt_state = carry
            value, grads = jax.value_and_grad(partial(loss, objective))(meta_params)
            updates, opt_state = inner.update(optimizer, grads, opt_state, meta_params, value)
            return (optax.apply_updates(meta_params, updates), opt_state), (value, optax.tree.norm(grads))

        (meta_params, opt_state), (values, norms) = lax.scan(step, (meta_params, opt_state), length=steps)
        # Metrics, on the same episodes.
        _, divergences = objective.loss(meta_params)
        return meta_params, opt_state, OuterInfo(norms[0], values[0] - loss(objective, meta_params), divergences.kl)

    return Outer(optimizer.init, update)
