"""Division of a pytree into two of the same structure, each with None for what the other has."""

from typing import Any

import jax


def divide(tree: Any, mask: Any) -> tuple[Any, Any]:
    """The leaves where `mask`, a tree of bools of the same structure, is True, and the others."""
    return (
        jax.tree.map(lambda keep, leaf: leaf if keep else None, mask, tree),
        jax.tree.map(lambda keep, leaf: None if keep else leaf, mask, tree),
    )


def join(first: Any, second: Any) -> Any:
    """What `divide` has divided."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)
