"""Splits a pytree into two of the same structure, each with None at the leaves of the other."""

from typing import Any

import jax
import numpy as np

from maml_jax.types import Params

Mask = Any
"""A pytree of bools with the structure of the parameters, a prefix of it, or a function from parameters to a mask."""


def divide(tree: Any, mask: Any) -> tuple[Any, Any]:
    """Splits a pytree into the leaves where `mask` is True and the other leaves. `mask` has the same structure."""
    return (
        jax.tree.map(lambda keep, leaf: leaf if keep else None, mask, tree),
        jax.tree.map(lambda keep, leaf: None if keep else leaf, mask, tree),
    )


def join(first: Any, second: Any) -> Any:
    """The inverse of `divide`."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)


def partition(params: Params, mask: Mask | None) -> tuple[Params, Params]:
    """Splits parameters into adapted and fixed ones, each with None at the leaves of the other. No mask: all adapted.

    Raises:
      TypeError: for a mask of anything but bools.
      ValueError: for a mask that does not fit the parameters, or that selects no parameter.
    """
    if mask is None:
        return params, None
    mask = mask_tree("trainable", mask, params)
    if not any(jax.tree.leaves(mask)):
        raise ValueError("trainable selects no parameter at all, so the inner loop has nothing to adapt.")
    return divide(params, mask)


def mask_tree(name: str, mask: Mask, params: Params) -> Any:
    """A mask as a pytree of bools with the structure of the parameters.

    Args:
      name: name of the argument, for error messages.
      mask: a pytree of bools, a prefix of it, or a function from the parameters to a mask.
      params: the parameters.

    Raises:
      TypeError: for a mask of anything but bools.
      ValueError: for a mask that does not fit the parameters.
    """
    # An equinox module is both a pytree and callable: as a mask it is a pytree of bools.
    if callable(mask) and not all(isinstance(leaf, bool) for leaf in jax.tree.leaves(mask)):
        mask = mask(params)
    try:
        mask = jax.tree.broadcast(mask, params)
    except ValueError as error:
        raise ValueError(
            f"{name} must be a pytree of bools with the structure of the parameters, or a prefix of it. "
            f"The parameters are {jax.tree.structure(params)}, the mask is {jax.tree.structure(mask)}."
        ) from error
    for path, leaf in jax.tree_util.tree_leaves_with_path(mask):
        if not (isinstance(leaf, bool) or (np.shape(leaf) == () and getattr(leaf, "dtype", None) == np.bool_)):
            raise TypeError(
                f"{name} must hold True or False for each array of parameters, but the value at "
                f"{jax.tree_util.keystr(path) or 'the root'} is {leaf!r}."
            )
    return mask


def combine(adapted: Params, fixed: Params) -> Params:
    """The inverse of `partition`."""
    if fixed is None:
        return adapted
    return join(adapted, fixed)
