"""Compares derivatives with central differences, and pytrees of numbers with each other."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxprs_in_params

LARGEST_LIMIT = 0.01
"""Largest limit in float64. Differences that are less certain can confirm no gradient."""


def coarsest_type(jaxpr: Any) -> np.dtype:
    """The floating-point type of the lowest precision in the operations that depend on the inputs of a program."""
    coarsest = np.dtype(np.float64)
    varying = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if varying.isdisjoint(atom for atom in equation.invars if not isinstance(atom, Literal)):
            continue
        varying.update(equation.outvars)
        found = [var.aval.dtype for var in equation.outvars if jnp.issubdtype(var.aval.dtype, jnp.floating)]
        found += [coarsest_type(inner) for inner in jaxprs_in_params(equation.params)]
        coarsest = max([coarsest, *found], key=lambda dtype: jnp.finfo(dtype).eps)
    return coarsest


def gradient_checker(tolerance: float, coarsest: np.dtype, directions: int, seed: int) -> "GradientChecker":
    """Returns a checker for functions that compute in the precision of the type `coarsest`.

    The best step length of central differences is near the cube root of the precision. Longer steps have errors from
    curvature and from kinks, such as a ReLU that switches within the step. Shorter steps have rounding errors, but an
    inner loop that diverges needs shorter steps. The checker tries several step lengths.

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
        steps = tuple(best * 10.0 ** (power / 2) for power in range(4, -9, -1))
        return GradientChecker(tolerance, max(tolerance, LARGEST_LIMIT), steps, directions, seed)
    tolerance = max(tolerance, precision**0.25)
    return GradientChecker(tolerance, tolerance, (10 * best, best, best / 10), directions, seed)


class Comparison(NamedTuple):
    """The comparison of a gradient with central differences."""

    error: float
    """Relative error along the direction that is furthest above its limit, or nearest to it. NaN if the gradient is not
    finite, or if all differences leave the domain of the function."""
    limit: float
    """The limit along this direction."""
    failing: tuple[Any, ...]
    """Paths of the leaves along which the error is above its limit."""

    @property
    def passed(self) -> bool:
        """Whether the error is at most its limit."""
        return self.error <= self.limit


class GradientChecker(NamedTuple):
    """Compares gradients with central differences along random directions, and along a random direction of each leaf.

    The limit of a direction is the tolerance, or three times the uncertainty of the differences along this direction,
    but at most `largest`. The uncertainty is the difference between the slopes of three consecutive step lengths, where
    it is smallest. It is large if the function amplifies rounding errors, as an inner loop that diverges does.
    """

    tolerance: float
    """Largest relative difference that counts as agreement."""
    largest: float
    """Largest limit where the differences are uncertain."""
    steps: tuple[float, ...]
    """Step lengths of the central differences, in decreasing order. The smallest error over the step lengths counts."""
    directions: int
    """Number of random directions in the space of all leaves."""
    seed: int
    """Seed of the directions."""

    def compare(self, fn: Callable[[Any], jax.Array], at: Any, gradient: Any) -> Comparison:
        """Compares `gradient` with the differences of `fn` at `at`."""
        random = np.random.default_rng(self.seed)
        along = [self._along(fn, at, gradient, random_direction(random, at)) for _ in range(self.directions)]
        failing = []
        for index, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(at)):
            direction = random_direction(np.random.default_rng(self.seed), at, only=index)
            along.append(self._along(fn, at, gradient, direction))
            if not along[-1][0] <= along[-1][1]:
                failing.append(path)
        error, limit = max(along, key=lambda pair: np.nan_to_num(pair[0] / pair[1], nan=np.inf))
        return Comparison(error, limit, tuple(failing))

    def _along(self, fn: Callable[[Any], jax.Array], at: Any, gradient: Any, direction: Any) -> tuple[float, float]:
        """The relative error along one direction, and its limit."""
        expected = dot(gradient, direction)
        size = sum(leaf.size for leaf in jax.tree.leaves(at))
        # Along a direction nearly orthogonal to the gradient, errors are relative to the typical slope.
        typical = norm(gradient) / size**0.5

        def slope(step: float) -> float:
            def move(x: Any, d: np.ndarray) -> np.ndarray:
                return (np.asarray(x) + step * d).astype(x.dtype)

            ahead = fn(jax.tree.map(move, at, direction))
            behind = fn(jax.tree.map(lambda x, d: move(x, -d), at, direction))
            difference = float(ahead - behind)
            return difference / (2 * step) if np.isfinite(difference) else float("nan")

        def error(slope: float) -> float:
            scale = max(abs(slope), abs(expected), typical)
            return 0.0 if scale == 0 else abs(slope - expected) / scale

        # Start with the best step length for a smooth function of moderate size, and stop at the first agreement.
        slopes: dict[float, float] = {}
        middle = self.steps[min(4, len(self.steps) // 2)]
        for step in sorted(self.steps, key=lambda step: abs(np.log(step / middle))):
            slopes[step] = slope(step)
            if error(slopes[step]) <= self.tolerance:
                return error(slopes[step]), self.tolerance
        # A long step may leave the domain of the loss, or overflow. If all steps do, the error is NaN.
        values = np.array([slopes[step] for step in self.steps])
        errors = np.array([error(value) for value in values])
        if np.isnan(errors).all():
            return float("nan"), self.tolerance
        return float(np.nanmin(errors)), max(self.tolerance, min(3 * _uncertainty(values, typical), self.largest))


def _uncertainty(slopes: np.ndarray, typical: float) -> float:
    """The relative difference between the slopes of three consecutive step lengths, where it is smallest."""
    if not slopes.any():
        return 0.0
    # A step that changes no digit of the function has the slope 0, and says nothing.
    slopes = np.where(slopes == 0, np.nan, slopes)
    triples = np.stack([slopes[:-2], slopes[1:-1], slopes[2:]])
    gaps = np.ptp(triples, 0) / np.maximum(np.abs(triples).max(0), typical)
    return float(np.min(gaps, where=np.isfinite(gaps), initial=np.inf))


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
