"""Evaluation of a program in float64, whatever types it casts to.

A loss may cast to bfloat16 or float32, as a model with `dtype=jnp.bfloat16` does. Its rounding errors then hide all but
large errors of a derivative. `in_float64` evaluates the same operations without these casts.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import eval_jaxpr
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxprs_in_params

INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat2": "jaxpr",  # Of `jax.checkpoint`.
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
}
"""Primitives that call a program, and the parameter that holds this program."""

AS_TRACED = {"bitcast_convert_type", "nextafter", "ffi_call", "pure_callback"}
"""Primitives that depend on the type of their operands. They run in the types of the loss."""


def in_float64(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `fn` with all floating-point operations in float64.

    The result is for evaluation only, because custom derivative rules are lost. To widen a derivative, widen the
    function that computes the derivative, such as `in_float64(jax.grad(fn))`. Operations that depend on the type of
    their operands, and calls of kernels and of the host, keep the types of `fn`.

    Example:
      >>> import jax.numpy as jnp
      >>> with jax.enable_x64(True):
      ...     rounded = lambda x: x.astype(jnp.bfloat16).astype(x.dtype)
      ...     x = jnp.array(1.001)
      ...     rounded(x).item(), in_float64(rounded)(x).item()
      (1.0, 1.001)

    Args:
      fn: any function of pytrees of arrays. Its floating-point arguments are float64.

    Returns:
      A function with the same arguments and results. float64 must be enabled (`jax_enable_x64`).
    """

    def widened(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        leaves = _evaluate(closed.jaxpr, closed.consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return widened


def _evaluate(program: Any, consts: Sequence[Any], *args: Any) -> list[Any]:
    """The results of a program, with all floating-point values in float64."""
    known = dict(zip((*program.constvars, *program.invars), map(_wide, (*consts, *args)), strict=True))

    def read(atom: Any) -> Any:
        return _wide(atom.val) if isinstance(atom, Literal) else known[atom]

    for equation in program.eqns:
        if _keeps_types(equation):
            variables = [atom for atom in dict.fromkeys(equation.invars) if not isinstance(atom, Literal)]
            alone = program.replace(constvars=[], invars=variables, outvars=equation.outvars, eqns=[equation])
            typed = [_typed(known[atom], atom.aval.dtype) for atom in variables]
            results: Sequence[Any] = [_wide(result) for result in eval_jaxpr(alone, [], *typed)]
        else:
            results = _results(equation, [read(atom) for atom in equation.invars])
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in program.outvars]


def _keeps_types(equation: Any) -> bool:
    """Whether an equation runs in the types of the loss."""
    name = equation.primitive.name
    if name in AS_TRACED or equation.effects:
        return True
    calls = any(True for _ in jaxprs_in_params(equation.params))
    return calls and name not in {*INLINED, "scan", "while", "cond"} and not name.startswith(("scatter", "reduce"))


def _results(equation: Any, args: list[Any]) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    if name in INLINED:
        return _function(params[INLINED[name]])(*args)
    if name == "scan":
        consts, others = _split(args, params["num_consts"])
        carry, sequences = _split(others, params["num_carry"])

        def step(carry: list[Any], inputs: list[Any]) -> tuple[list[Any], list[Any]]:
            return _split(_function(params["jaxpr"])(*consts, *carry, *inputs), len(carry))

        carry, stacked = lax.scan(step, carry, sequences, length=params["length"], reverse=params["reverse"])
        return [*carry, *stacked]
    if name == "while":
        tests, others = _split(args, params["cond_nconsts"])
        bodies, carry = _split(others, params["body_nconsts"])
        goes_on, body = _function(params["cond_jaxpr"]), _function(params["body_jaxpr"])
        return lax.while_loop(lambda carry: goes_on(*tests, *carry)[0], lambda carry: body(*bodies, *carry), carry)
    if name == "cond":
        return lax.switch(args[0], [_function(branch) for branch in params["branches"]], *args[1:])
    if name == "reduce_precision":
        return args
    results = equation.primitive.bind(*args, **{key: _wide_parameter(key, value) for key, value in params.items()})
    return results if equation.primitive.multiple_results else [results]


def _split(values: list[Any], count: int) -> tuple[list[Any], list[Any]]:
    return values[:count], values[count:]


def _function(program: Any) -> Callable[..., list[Any]]:
    if isinstance(program, ClosedJaxpr):
        return partial(_evaluate, program.jaxpr, program.consts)
    return partial(_evaluate, program, ())


def _is_floating(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _wide(value: Any) -> Any:
    return _typed(value, np.dtype(np.float64)) if _is_floating(jnp.result_type(value)) else value


def _typed(value: Any, dtype: Any) -> Any:
    return jnp.asarray(value, dtype) if _is_floating(dtype) else value


def _wide_parameter(key: str, value: Any) -> Any:
    if key == "precision":  # The algorithm of a product, which may be for one type alone.
        return None
    if isinstance(value, (Jaxpr, ClosedJaxpr)):  # The sum in a scatter, or the operation of a reduction.
        program: Any = value.jaxpr if isinstance(value, ClosedJaxpr) else value
        scalars = [_wide(np.zeros(variable.aval.shape, variable.aval.dtype)) for variable in program.invars]
        wide = jax.make_jaxpr(_function(value))(*scalars)
        return wide if isinstance(value, ClosedJaxpr) else wide.jaxpr
    return np.dtype(np.float64) if isinstance(value, np.dtype) and _is_floating(value) else value
