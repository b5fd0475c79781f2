"""The gradient of a loss, differentiated in forward mode without stored intermediate values.

Reverse mode over a gradient stores all intermediate values of the gradient. The second-order meta-gradient needs only
the product of the Hessian with one vector. The Hessian is symmetric, so this product is also the derivative of the
gradient along the vector. Forward mode computes this derivative together with the gradient, and stores only the
parameters (MixFlow-MG, Kemaev et al. 2025, arXiv:2505.00793).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun, jaxprs_in_params

from maml_jax.autodiff.trees import divide, join
from maml_jax.types import Params

LossWithInputs = Callable[[Params, Any], tuple[jax.Array, Any]]
"""`(params, inputs) -> (loss, aux)`, with any pytree of inputs."""

ValueAndGrad = Callable[[Params, Any], tuple[tuple[jax.Array, Any], Params]]
"""`(params, inputs) -> ((loss, aux), gradient in params)`."""


def forward_over_reverse(loss_fn: LossWithInputs) -> ValueAndGrad:
    """`jax.value_and_grad(loss_fn, has_aux=True)`, with a reverse-mode derivative that stores only the inputs.

    The derivative is exact in `params`, in the floating-point leaves of the inputs, and in values that the loss closes
    over. The derivative of aux is zero. Forward-mode derivatives of the result are not defined. If a `custom_vjp` in
    the loss allows no forward mode, the derivative uses reverse mode, with the intermediate values of one gradient.

    Example:
      >>> import jax
      >>> value_and_grad = forward_over_reverse(lambda params, scale: (scale * params**3, {}))
      >>> jax.grad(lambda params: value_and_grad(params, 2.0)[1])(1.0).item()  # 2 * 6 * params
      12.0

    Args:
      loss_fn: `(params, inputs) -> (loss, aux)`.

    References:
      Kemaev et al. 2025, Scalable meta-learning via mixed-mode differentiation, arXiv:2505.00793.
    """

    def value_and_grad(params: Params, inputs: Any) -> tuple[tuple[jax.Array, Any], Params]:
        # Values that the loss closes over become inputs too: an outer derivative may depend on them.
        closed, shapes = jax.make_jaxpr(loss_fn, return_shape=True)(params, inputs)

        def loss(params: Params, all_inputs: Any) -> tuple[jax.Array, Any]:
            inputs, captured = all_inputs
            outputs = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, captured))(*jax.tree.leaves((params, inputs)))
            loss, aux = jax.tree.unflatten(jax.tree.structure(shapes), outputs)
            return loss, jax.lax.stop_gradient(aux)

        return _value_and_grad(loss, params, (inputs, closed.consts))

    return value_and_grad


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _value_and_grad(loss: LossWithInputs, params: Params, inputs: Any) -> Any:
    return jax.value_and_grad(loss, has_aux=True)(params, inputs)


def _forward(loss: LossWithInputs, params: Params, inputs: Any) -> Any:
    return _value_and_grad(loss, params, inputs), (params, inputs)


def _backward(loss: LossWithInputs, residuals: Any, cotangent: Any) -> Any:
    params, inputs = residuals
    (loss_cotangent, _), direction = cotangent
    floating, others = divide(inputs, jax.tree.map(_is_floating, inputs))

    def gradients(params: Params, floating: Any) -> Any:
        return jax.grad(lambda params, floating: loss(params, join(floating, others))[0], (0, 1))(params, floating)

    # The cotangent of the gradient is a direction in parameter space. The product of the (mixed) second derivatives
    # with this direction is the derivative of the gradients along the direction.
    if _calls_custom_vjp(jax.make_jaxpr(gradients)(params, floating).jaxpr):
        first, pullback = jax.vjp(gradients, params, floating)
        second = pullback((direction, jax.tree.map(jnp.zeros_like, floating)))
    else:
        first, second = jax.jvp(lambda params: gradients(params, floating), (params,), (direction,))
    return jax.tree.map(lambda g, along: (loss_cotangent * g + along).astype(g.dtype), first, second)


def _calls_custom_vjp(program: Any) -> bool:
    """Whether a gradient still has a `custom_vjp`, such as one that is called by its own forward rule."""
    return any(
        equation.primitive.name == "custom_vjp_call" or any(map(_calls_custom_vjp, jaxprs_in_params(equation.params)))
        for equation in program.eqns
    )


def _is_floating(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


_value_and_grad.defvjp(_forward, _backward)
