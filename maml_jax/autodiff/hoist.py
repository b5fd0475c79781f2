"""Loop-invariant code motion: moves operations out of a loop if their results are the same in all steps.

Examples are the features of a body that the inner loop does not adapt (ANIL), and the moments of the inputs. A JAX loop
recomputes such invariants in each step, and XLA does not move costly operations out of a loop.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.core import eval_jaxpr
from jax.extend.core import Literal

EXPANDING = {"broadcast_in_dim", "iota", "reshape", "squeeze", "transpose", "convert_element_type", "copy"}
"""Primitives that stay in the loop. They are cheap to recompute, and often have larger results than inputs."""


def hoist(step: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """Evaluates the operations of `step` that depend only on closed-over values, and returns a function for the rest.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> matrix = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> step = hoist(lambda x: (matrix @ matrix) @ x, jax.ShapeDtypeStruct((2,), jnp.float32))
      >>> step(jnp.ones(2)).tolist()  # One product of a matrix with a vector.
      [17.0, 37.0]

    Args:
      step: a function of pytrees that is called many times. The values that it closes over stay the same.
      args: arguments with the shapes and types of later calls, such as `jax.ShapeDtypeStruct`s.

    Returns:
      A function with the same results and derivatives as `step`.
    """
    closed, out_shapes = jax.make_jaxpr(step, return_shape=True)(*args)
    program = closed.jaxpr
    defined_by: dict[Any, int] = {
        variable: place for place, equation in enumerate(program.eqns) for variable in equation.outvars
    }

    # 1. Equations that depend on the arguments, or have effects, stay in the loop.
    varying: set[Any] = set(program.invars)
    in_loop: set[int] = set()
    for place, equation in enumerate(program.eqns):
        if equation.effects or not varying.isdisjoint(_variables(equation.invars)):
            varying.update(equation.outvars)
            in_loop.add(place)

    # 2. Find the invariant variables that the loop needs. The loop recomputes the results of expanding primitives.
    needed: dict[Any, None] = {}  # An ordered set.
    pending = [*_variables(program.outvars), *(v for place in in_loop for v in _variables(program.eqns[place].invars))]
    while pending:
        variable = pending.pop()
        definition = defined_by.get(variable)
        if variable in varying or definition in in_loop:
            continue
        if definition is None or program.eqns[definition].primitive.name not in EXPANDING:
            needed[variable] = None
        else:
            in_loop.add(definition)
            pending += _variables(program.eqns[definition].invars)

    # 3. Move the equations that these variables depend on in front of the loop.
    before: set[int] = set()
    pending = [*needed]
    while pending:
        definition = defined_by.get(pending.pop())
        if definition is not None and definition not in before:
            before.add(definition)
            pending += _variables(program.eqns[definition].invars)

    # 4. Evaluate the moved equations, and return a function that evaluates the equations of the loop.
    before_equations, loop_equations = ([program.eqns[place] for place in sorted(s)] for s in (before, in_loop))
    before_loop = program.replace(constvars=[], invars=program.constvars, outvars=[*needed], eqns=before_equations)
    loop = program.replace(constvars=[], invars=[*program.invars, *needed], eqns=loop_equations)
    values = eval_jaxpr(before_loop, [], *closed.consts)

    def hoisted_step(*args: Any) -> Any:
        leaves = eval_jaxpr(loop, [], *jax.tree.leaves(args), *values)
        return jax.tree.unflatten(jax.tree.structure(out_shapes), leaves)

    return hoisted_step


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]
