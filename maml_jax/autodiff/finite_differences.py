"""Derivatives held against central differences, and pytrees of numbers against each other."""

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
    """A checker of what is computed in that precision, from the tolerance of float64.

    Its steps are near the best for central differences, the cube root of the precision. Wider steps suffer from
    curvature and from kinks (a ReLU that switches in between), narrower ones from rounding; the best of several counts.
    """
    precision = float(jnp.finfo(coarsest).eps)
    best = precision ** (1 / 3)
    if coarsest == np.float64:
        return GradientChecker(tolerance, (100 * best, 10 * best, best, best / 10), directions, seed)
    return GradientChecker(max(tolerance, precision**0.25), (10 * best, best, best / 10), directions, seed)


class GradientChecker(NamedTuple):
    """How differences are taken, and what counts as agreement."""

    tolerance: float
    """Relative difference up to which two results agree."""
    steps: tuple[float, ...]
    """Lengths on either side, of which the best counts."""
    directions: int
    """Random directions along which a derivative is looked at."""
    seed: int
    """Of the directions."""

    def error(self, fn: Callable[[Any], jax.Array], at: Any, gradient: Any) -> float:
        """The largest relative error of `gradient` along the random directions; NaN if it is not finite."""
        random = np.random.default_rng(self.seed)
        return float(
            np.max([self._along(fn, at, gradient, drawn_direction(random, at)) for _ in range(self.directions)])
        )

    def failing_leaves(self, fn: Callable[[Any], jax.Array], at: Any, gradient: Any) -> str:
        """Names the leaves along which `gradient` is wrong."""
        wrong = []
        for index, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(at)):
            error = self._along(fn, at, gradient, drawn_direction(np.random.default_rng(self.seed), at, only=index))
            if not error <= self.tolerance:
                wrong.append(path)
        return f", along {listed(wrong)}" if wrong else ""

    def _along(self, fn: Callable[[Any], jax.Array], at: Any, gradient: Any, direction: Any) -> float:
        claimed = dot(gradient, direction)
        size = sum(leaf.size for leaf in jax.tree.leaves(at))
        # A direction that happens to lie across the gradient is measured against the typical slope.
        typical = norm(gradient) / size**0.5

        def error(step: float) -> float:
            def moved(x: Any, d: np.ndarray) -> np.ndarray:
                return (np.asarray(x) + step * d).astype(x.dtype)

            ahead = fn(jax.tree.map(moved, at, direction))
            behind = fn(jax.tree.map(lambda x, d: moved(x, -d), at, direction))
            slope = float(ahead - behind) / (2 * step)
            scale = max(abs(slope), abs(claimed), typical)
            return 0.0 if scale == 0 else abs(slope - claimed) / scale

        errors = np.array([error(step) for step in self.steps])
        # A wide step may leave the loss's domain; where all do, or the gradient is no number, that is the finding.
        return float(np.nan if np.isnan(errors).all() else np.nanmin(errors))


def cast(tree: Any, dtype: Any) -> Any:
    """Floating-point leaves as NumPy arrays of that type, integers no wider than it; the others as they are."""

    def of_leaf(leaf: Any) -> Any:
        kind = jnp.result_type(leaf)
        if jnp.issubdtype(kind, jnp.floating):
            return np.asarray(leaf, dtype)
        wide = jnp.issubdtype(kind, jnp.integer) and np.dtype(kind).itemsize > np.dtype(dtype).itemsize
        return np.asarray(leaf, np.int32) if wide else leaf

    return jax.tree.map(of_leaf, tree)


def listed(paths: list[Any]) -> str:
    """Names of leaves, the first of them if they are many."""
    names = [jax.tree_util.keystr(path) for path in paths]
    return f"{', '.join(names[:6])}{' and more' if len(names) > 6 else ''}"


# NumPy from here on: compiling each of these small sums would take longer than all the rest.


def drawn_direction(random: np.random.Generator, like: Any, only: int | None = None) -> Any:
    """A random direction of norm 1, within one leaf if `only` is its index."""
    leaves, structure = jax.tree.flatten(like)
    drawn = [random.standard_normal(leaf.shape) for leaf in leaves]
    if only is not None:
        drawn = [d if index == only else np.zeros_like(d) for index, d in enumerate(drawn)]
    length = norm(drawn)
    return jax.tree.unflatten(structure, [d / length for d in drawn])


def dot(a: Any, b: Any) -> float:
    """Sum of the products of all numbers of two pytrees."""
    return sum(float(np.vdot(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def norm(tree: Any) -> float:
    """Root of the sum of the squares of all numbers."""
    return dot(tree, tree) ** 0.5


def relative_difference(a: Any, b: Any) -> float:
    """Norm of the difference of two pytrees over the norm of `b`; 0 if both are 0, infinite if `b` alone is."""
    apart, size = norm(jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), a, b)), norm(b)
    return 0.0 if apart == 0 else apart / size if size else float("inf")
