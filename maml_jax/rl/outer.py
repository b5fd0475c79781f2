"""The outer step as a value: how meta-parameters follow from an objective.

Here are the policy gradient and ProMP; `trust_region` has TRPO.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax import lax

from maml_jax import inner, validation
from maml_jax.rl.objective import Objective

MetaParams = Any
"""The pair `(params, inner_params)`."""


class OuterInfo(NamedTuple):
    """What is reported of one outer step; scalars."""

    grad_norm: jax.Array
    """Of the gradient before the step."""
    improvement: jax.Array
    """By how much the loss has fallen on the same episodes."""
    kl: jax.Array
    """KL divergence of the adapted policies, from before to after the step."""


class Outer(NamedTuple):
    """How the meta-parameters are updated. Build it with `trust_region.trpo`, `policy_gradient` or `promp`."""

    init: Callable[[MetaParams], Any]
    """Its state, from the meta-parameters."""
    update: Callable[[Objective, MetaParams, Any], tuple[MetaParams, Any, OuterInfo]]
    """`(objective, meta_params, state) -> (meta_params, state, info)`."""


def policy_gradient(optimizer: optax.GradientTransformation) -> Outer:
    """One step of an optax optimizer along the gradient of the objective ('vanilla' policy gradient).

    Raises:
      TypeError: if `optimizer` is not an optax transformation.
    """
    return _descent(optimizer, lambda objective, meta_params: objective.terms(meta_params).loss, steps=1)


def promp(
    optimizer: optax.GradientTransformation, *, steps: int = 5, clip: float = 0.3, inner_kl_weight: float = 5e-4
) -> Outer:
    """Proximal meta-policy search (Rothfuss et al. 2019, algorithm 1): several steps on the same episodes.

    The inner loss that belongs to it is 'lvc'.

    Args:
      optimizer: an optax transformation.
      steps: optimizer steps on each meta-batch.
      clip: likelihood ratios outside 1 +- clip gain nothing.
      inner_kl_weight: weight of the divergence of the policies before each inner step.

    Raises:
      TypeError, ValueError: for an optimizer that is none, fewer than 1 step, and for a clip or weight that is
        not positive.
    """
    validation.at_least("steps", steps, 1)
    validation.positive("clip", clip)
    validation.positive("inner_kl_weight", inner_kl_weight)

    def loss(objective: Objective, meta_params: MetaParams) -> jax.Array:
        terms = objective.terms(meta_params, clip)
        return terms.loss + inner_kl_weight * terms.inner_kl

    return _descent(optimizer, loss, steps)


def _descent(
    optimizer: optax.GradientTransformation, loss: Callable[[Objective, MetaParams], jax.Array], steps: int
) -> Outer:
    validation.transformation("optimizer", optimizer)

    def update(objective: Objective, meta_params: MetaParams, opt_state: Any) -> tuple[MetaParams, Any, OuterInfo]:
        def step(carry: Any, _: None) -> Any:
            meta_params, opt_state = carry
            value, grads = jax.value_and_grad(lambda meta_params: loss(objective, meta_params))(meta_params)
            updates, opt_state = inner.update(optimizer, grads, opt_state, meta_params, value)
            return (optax.apply_updates(meta_params, updates), opt_state), (value, optax.tree.norm(grads))

        (meta_params, opt_state), (values, norms) = lax.scan(step, (meta_params, opt_state), length=steps)
        after = objective.terms(meta_params)
        return meta_params, opt_state, OuterInfo(norms[0], values[0] - loss(objective, meta_params), after.kl)

    return Outer(optimizer.init, update)
