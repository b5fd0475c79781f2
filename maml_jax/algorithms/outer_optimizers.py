"""Separate outer optimizers for the parameters and for the learned parameters of the inner update."""

from typing import Any

import jax
import optax

from maml_jax import validation
from maml_jax.inner import update
from maml_jax.types import MetaParams


def separate_outer(
    params: optax.GradientTransformation, inner_params: optax.GradientTransformation
) -> optax.GradientTransformation:
    """An outer optimizer for an inner learner with learned parameters, such as learned rates.

    A single outer optimizer acts on `MetaParams(params, inner_params)`. Its weight decay and momentum also act on
    learned rates, and can make them negative. Its masks and labels need the structure of the pair. Here `params` gets
    the parameters of the model alone, so masks and labels for the model fit.

    Example:
      >>> import jax.numpy as jnp, maml_jax, optax
      >>> from maml_jax.algorithms.outer_optimizers import separate_outer
      >>> def loss_fn(params, batch):
      ...     return jnp.mean((batch @ params["w"] + params["b"] - 1) ** 2), {}
      >>> outer = separate_outer(
      ...     params=optax.adamw(1e-3, mask={"w": True, "b": False}),  # No weight decay of the bias.
      ...     inner_params=optax.chain(optax.adam(1e-3), optax.keep_params_nonnegative()),
      ... )
      >>> inner = maml_jax.sgd(0.1, steps=2, learn_rates="layer")
      >>> learner = maml_jax.maml(loss_fn, inner, outer)
      >>> state = learner.init({"w": jnp.zeros(3), "b": jnp.zeros(())})

    Args:
      params: optimizer of the parameters of the model.
      inner_params: optimizer of the learned parameters of the inner update.

    Returns:
      An outer optimizer, for `maml`.

    Raises:
      TypeError: if an argument is not an optax transformation.
      ValueError (by `init` of the learner): for an inner learner without learned parameters.
    """
    validation.transformation("params", params)
    validation.transformation("inner_params", inner_params)

    def init(meta_params: Any) -> Any:
        if not isinstance(meta_params, MetaParams):
            raise ValueError(
                "separate_outer takes an inner learner with learned parameters, such as sgd(..., "
                "learn_rates='layer'). Without them, give the optimizer of the parameters alone."
            )
        return params.init(meta_params.params), inner_params.init(meta_params.inner_params)

    # `optax.chain` passes the gradient of the pair as `grad`. Each optimizer gets the gradient of its part instead.
    def update_both(grads: Any, states: Any, meta_params: Any = None, *, value: jax.Array, **_: Any) -> Any:
        parts = zip((params, inner_params), grads, states, meta_params, strict=True)
        results = [update(optimizer, gradient, state, part, value) for optimizer, gradient, state, part in parts]
        return MetaParams(*(updates for updates, _ in results)), tuple(state for _, state in results)

    return optax.GradientTransformationExtraArgs(init, update_both)
