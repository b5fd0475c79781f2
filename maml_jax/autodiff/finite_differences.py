"""Compares derivatives with central differences, and pytrees of numbers with each other."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params


def coarsest_type(jaxpr: Any) -> np.dtype:
    """The floating-point type of the lowest precision that a program computes in."""
    coarsest = np.dtype(np.float64)
    for equation in jaxpr.eqns:
        found = [var.aval.dtype for var in equation.outvars if jnp.issubdtype(var.aval.dtype, jnp.floating)]
        found += [coarsest_type(inner) for inner in jaxprs_in_params(equation.params)]
        coarsest = max([coarsest, *found], key=lambda dtype: jnp.finfo(dtype).eps)
    return coarsest


def gradient_checker(tolerance: float, coarsest: np.dtype, directions: int, seed: int) -> "GradientChecker":
    """Returns a checker for functions that compute in the precision of the type `coarsest`.

    The best step length of central differences is near the cube root of the precision. Longer steps have errors from
    curvature and from kinks, such as a ReLU that switches within the step. Shorter steps have rounding errors. The
    checker tries several step lengths.

    Args:
      tolerance: largest relative difference that counts as agreement in float64. For other types the tolerance is at
        least the fourth root of their precision.
      coarsest: floating-point type of the lowest precision in the function.
      directions: number of random directions.
      seed: seed of the directions.
    """
    precision = float(jnp.finfo(coarsest).eps)
    best = precision ** (1 / 3)
    if coarsest == np.float64:
        return GradientChecker(tolerance, (100 * best, 10 * best, best, best / 10), directions, seed)
    return GradientChecker(max(tolerance, precision**0.25), (10 * best, best, best / 10), directions, seed)


class GradientChecker(NamedTuple):
    """Compares gradients with central differences along random directions."""

    tolerance: float
    """Largest relative difference that counts as agreement."""
    steps: tuple[float, ...]
    """Step lengths of the central differences. The smallest error over the step lengths counts."""
    directions: int
    """Number of random directions."""
    seed: int
    """Seed of the directions."""

    def error(self, fn: Callable[[Any], jax.Array], at: Any, gradient: Any) -> float:
        """The largest relative error of `gradient` over the directions; NaN if `gradient` is not finite."""
        random = np.random.default_rng(self.seed)
        errors = [self._error_along(fn, at, gradient, random_direction(random, at)) for _ in range(self.directions)]
        return float(np.max(errors))

    def failing_leaves(self, fn: Callable[[Any], jax.Array], at: Any, gradient: Any) -> str:
        """Returns the names of the leaves in which `gradient` is wrong, or an empty string."""
        failing = []
        for index, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(at)):
            direction = random_direction(np.random.default_rng(self.seed), at, only=index)
            if not self._error_along(fn, at, gradient, direction) <= self.tolerance:
                failing.append(path)
        return leaf_names(failing)

    def _error_along(self, fn: Callable[[Any], jax.Array], at: Any, gradient: Any, direction: Any) -> float:
        expected_slope = dot(gradient, direction)
        size = sum(leaf.size for leaf in jax.tree.leaves(at))
        # Along a direction nearly orthogonal to the gradient, errors are relative to the typical slope.
        typical = norm(gradient) / size**0.5

        def error(step: float) -> float:
            def move(x: Any, d: np.ndarray) -> np.ndarray:
                return (np.asarray(x) + step * d).astype(x.dtype)

            ahead = fn(jax.tree.map(move, at, direction))
            behind = fn(jax.tree.map(lambda x, d: move(x, -d), at, direction))
            slope = float(ahead - behind) / (2 * step)
            scale = max(abs(slope), abs(expected_slope), typical)
            return 0.0 if scale == 0 else abs(slope - expected_slope) / scale

        errors = np.array([error(step) for step in self.steps])
        # A long step may leave the domain of the loss. If all steps leave the domain, the error is NaN.
        return float(np.nan if np.isnan(errors).all() else np.nanmin(errors))


def cast(tree: Any, dtype: Any) -> Any:
    """Casts floating-point leaves to NumPy arrays of `dtype`, and integers wider than `dtype` to int32."""

    def cast_leaf(leaf: Any) -> Any:
        kind = jnp.result_type(leaf)
        if jnp.issubdtype(kind, jnp.floating):
            return np.asarray(leaf, dtype)
        wide = jnp.issubdtype(kind, jnp.integer) and np.dtype(kind).itemsize > np.dtype(dtype).itemsize
        return np.asarray(leaf, np.int32) if wide else leaf

    return jax.tree.map(cast_leaf, tree)


def leaf_names(paths: list[Any]) -> str:
    """The names of leaves, at most six of them."""
    names = [jax.tree_util.keystr(path) for path in paths]
    return f"{', '.join(names[:6])}{' and others' if len(names) > 6 else ''}"


# The functions below use NumPy: compiling these small sums with JAX would take longer than the check.


def random_direction(random: np.random.Generator, like: Any, only: int | None = None) -> Any:
    """A random direction of norm 1 in the space of a pytree. With `only`, just the leaf of that index is not zero."""
    leaves, structure = jax.tree.flatten(like)
    drawn = [random.standard_normal(leaf.shape) for leaf in leaves]
    if only is not None:
        drawn = [d if index == only else np.zeros_like(d) for index, d in enumerate(drawn)]
    length = norm(drawn)
    return jax.tree.unflatten(structure, [d / length for d in drawn])


def dot(a: Any, b: Any) -> float:
    """The inner product of two pytrees."""
    return sum(float(np.vdot(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def norm(tree: Any) -> float:
    """The Euclidean norm of all numbers in a pytree."""
    return dot(tree, tree) ** 0.5


def relative_difference(a: Any, b: Any) -> float:
    """Norm of `a - b`, divided by the norm of `b`. 0 if both norms are 0, infinite if only the norm of `b` is 0."""
    difference, size = norm(jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), a, b)), norm(b)
    return 0.0 if difference == 0 else difference / size if size else float("inf")
