"""What does not change from one inner step to the next, computed once before the first.

Such as the features of a body that is not adapted (ANIL), or the moments of the inputs. A loop of JAX computes what its
body closes over anew each time round, and XLA moves no costly operation out of it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.core import eval_jaxpr
from jax.extend.core import Literal

EXPANDING = {"broadcast_in_dim", "iota", "reshape", "squeeze", "transpose", "convert_element_type", "copy"}
"""Cheap to do again, and often larger than what they are made of: these stay in the loop."""


def hoist(step: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """`step`, with all that depends on nothing but what it closes over computed now.

    Args:
      step: a function of pytrees, to be called many times with what changes; what it closes over stays the same.
      args: of the shapes and types of those to come, such as `jax.ShapeDtypeStruct`s.

    Returns:
      A function with the same results and derivatives.
    """
    closed, shape = jax.make_jaxpr(step, return_shape=True)(*args)
    whole = closed.jaxpr
    made_by: dict[Any, int] = {
        variable: place for place, equation in enumerate(whole.eqns) for variable in equation.outvars
    }

    changing: set[Any] = set(whole.invars)
    inside: set[int] = set()
    for place, equation in enumerate(whole.eqns):
        if equation.effects or not changing.isdisjoint(_variables(equation.invars)):
            changing.update(equation.outvars)
            inside.add(place)

    kept: dict[Any, None] = {}  # In order, and once each.
    wanted = [*_variables(whole.outvars), *(v for place in inside for v in _variables(whole.eqns[place].invars))]
    while wanted:
        variable = wanted.pop()
        maker = made_by.get(variable)
        if variable in changing or maker in inside:
            continue
        if maker is None or whole.eqns[maker].primitive.name not in EXPANDING:
            kept[variable] = None
        else:
            inside.add(maker)
            wanted += _variables(whole.eqns[maker].invars)

    before: set[int] = set()
    wanted = [*kept]
    while wanted:
        maker = made_by.get(wanted.pop())
        if maker is not None and maker not in before:
            before.add(maker)
            wanted += _variables(whole.eqns[maker].invars)

    equations = [[whole.eqns[place] for place in sorted(places)] for places in (before, inside)]
    once = whole.replace(constvars=[], invars=whole.constvars, outvars=[*kept], eqns=equations[0])
    loop = whole.replace(constvars=[], invars=[*whole.invars, *kept], eqns=equations[1])
    values = eval_jaxpr(once, [], *closed.consts)

    def call(*args: Any) -> Any:
        leaves = eval_jaxpr(loop, [], *jax.tree.leaves(args), *values)
        return jax.tree.unflatten(jax.tree.structure(shape), leaves)

    return call


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]
