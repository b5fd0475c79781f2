"""Counts the floating-point operations of the matrix products and convolutions in a program.

XLA's own analysis counts the body of a loop once. This module multiplies the count of a scan by its length.
"""

import math
from typing import Any

from jax.extend.core import jaxprs_in_params


def count(jaxpr: Any) -> int:
    """Counts the multiplications and additions of all matrix products and convolutions in a jaxpr."""
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> int:
    name = equation.primitive.name
    shapes = [var.aval.shape for var in (*equation.invars, *equation.outvars) if hasattr(var.aval, "shape")]
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2 * math.prod(shapes[-1]) * math.prod(shapes[0][axis] for axis in contracted)
    if name.startswith("maml_jax_"):
        # A convolution and both of its gradients have the same number of operations.
        kernel = {"conv": shapes[1], "input_gradient": shapes[1], "kernel_gradient": shapes[2]}[name[9:]]
        output = {"conv": shapes[2], "input_gradient": shapes[0], "kernel_gradient": shapes[1]}[name[9:]]
        return 2 * math.prod(output) * math.prod(kernel[1:4])
    if name == "conv_general_dilated":
        dimensions = equation.params["dimension_numbers"]
        kernel = shapes[1]
        return 2 * math.prod(shapes[-1]) * math.prod(kernel) // kernel[dimensions.rhs_spec[0]]
    inner = sum(count(body) for body in jaxprs_in_params(equation.params))
    return inner * equation.params.get("length", 1) if name == "scan" else inner
