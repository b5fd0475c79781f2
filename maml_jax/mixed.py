"""The gradient of a loss, with a derivative of its own that keeps nothing of how the gradient was computed.

To differentiate a gradient backwards keeps all that it computed. Yet what is wanted of the matrix of
second derivatives is its product with one vector, and as that matrix is symmetric, the product is also
the derivative of the gradient in the direction of that vector, which can be taken forwards, while the
gradient is computed once more (MixFlow-MG, Kemaev et al. 2025).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maml_jax.types import Params

ValueAndGrad = Callable[[Params, Any], tuple[tuple[jax.Array, Any], Params]]


def mixed_value_and_grad(loss_fn: Callable[[Params, Any], tuple[jax.Array, Any]]) -> ValueAndGrad:
    """`jax.value_and_grad(loss_fn, has_aux=True)` of `(params, others) -> (loss, aux)`, derived as said above.

    Its derivative in `params` and in whatever is floating-point of `others`, and of what the loss closes
    over, is exact. Aux counts as constant, and forward-mode derivatives are not defined.
    """

    def value_and_grad(params: Params, others: Any) -> tuple[tuple[jax.Array, Any], Params]:
        # What the loss closes over is an argument too: it may depend on what is differentiated.
        closed, captured = jax.closure_convert(loss_fn, params, others)
        return exact(closed, params, (others, captured))

    def exact(closed: Callable[..., Any], params: Params, inputs: Any) -> tuple[tuple[jax.Array, Any], Params]:
        def of(params: Params, inputs: Any) -> tuple[jax.Array, Any]:
            others, captured = inputs
            loss, aux = closed(params, others, *captured)
            return loss, jax.lax.stop_gradient(aux)

        @jax.custom_vjp
        def gradient(params: Params, inputs: Any) -> Any:
            return jax.value_and_grad(of, has_aux=True)(params, inputs)

        def forward(params: Params, inputs: Any) -> Any:
            return gradient(params, inputs), (params, inputs)

        def backward(kept: Any, cotangent: Any) -> Any:
            params, inputs = kept
            (along_loss, _), direction = cotangent
            leaves, structure = jax.tree.flatten(inputs)
            floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

            def gradients(params: Params) -> Any:
                def loss(params: Params, differentiable: list[jax.Array]) -> jax.Array:
                    given = iter(differentiable)
                    merged = [next(given) if is_float else leaf for is_float, leaf in zip(floating, leaves)]
                    return of(params, jax.tree.unflatten(structure, merged))[0]

                differentiable = [leaf for is_float, leaf in zip(floating, leaves) if is_float]
                return jax.grad(loss, (0, 1))(params, differentiable)

            first, second = jax.jvp(gradients, (params,), (direction,))
            of_params, of_floats = jax.tree.map(lambda g, h: along_loss * g + h, first, second)
            given = iter(of_floats)
            of_inputs = [next(given) if is_float else None for is_float in floating]
            return of_params, jax.tree.unflatten(structure, of_inputs)

        gradient.defvjp(forward, backward)
        return gradient(params, inputs)

    return value_and_grad
