"""The gradient of a loss, with a derivative of its own that keeps nothing of how the gradient was computed.

To differentiate a gradient backwards keeps all that it computed. Yet what is wanted of the matrix of
second derivatives is its product with one vector, and as that matrix is symmetric, the product is also
the derivative of the gradient in the direction of that vector, which can be taken forwards, while the
gradient is computed once more (MixFlow-MG, Kemaev et al. 2025).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from maml_jax.autodiff.trees import divide, join
from maml_jax.types import Params

ValueAndGrad = Callable[[Params, Any], tuple[tuple[jax.Array, Any], Params]]


def forward_over_reverse(loss_fn: Callable[[Params, Any], tuple[jax.Array, Any]]) -> ValueAndGrad:
    """`jax.value_and_grad(loss_fn, has_aux=True)` of `(params, others) -> (loss, aux)`, derived as said above.

    Its derivative in `params` and in whatever is floating-point of `others`, and of what the loss closes
    over, is exact. Aux counts as constant, and forward-mode derivatives are not defined.
    """

    def value_and_grad(params: Params, others: Any) -> tuple[tuple[jax.Array, Any], Params]:
        # What the loss closes over is an input too: it may depend on what is differentiated.
        closed, shapes = jax.make_jaxpr(loss_fn, return_shape=True)(params, others)

        def loss(params: Params, inputs: Any) -> tuple[jax.Array, Any]:
            others, captured = inputs
            outputs = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, captured))(*jax.tree.leaves((params, others)))
            loss, aux = jax.tree.unflatten(jax.tree.structure(shapes), outputs)
            return loss, jax.lax.stop_gradient(aux)

        return _value_and_grad(loss, params, (others, closed.consts))

    return value_and_grad


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _value_and_grad(loss: Callable[[Params, Any], tuple[jax.Array, Any]], params: Params, inputs: Any) -> Any:
    return jax.value_and_grad(loss, has_aux=True)(params, inputs)


def _forward(loss: Callable[[Params, Any], tuple[jax.Array, Any]], params: Params, inputs: Any) -> Any:
    return _value_and_grad(loss, params, inputs), (params, inputs)


def _backward(loss: Callable[[Params, Any], tuple[jax.Array, Any]], kept: Any, cotangent: Any) -> Any:
    params, inputs = kept
    (along_loss, _), direction = cotangent
    floating, rest = divide(inputs, jax.tree.map(_is_floating, inputs))

    def gradients(params: Params) -> Any:
        return jax.grad(lambda params, floating: loss(params, join(floating, rest))[0], (0, 1))(params, floating)

    # The row of mixed derivatives for an input, times the direction in the parameters, is the derivative
    # of that input's gradient along the direction.
    first, second = jax.jvp(gradients, (params,), (direction,))
    return jax.tree.map(lambda gradient, along: along_loss * gradient + along, first, second)


def _is_floating(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


_value_and_grad.defvjp(_forward, _backward)
