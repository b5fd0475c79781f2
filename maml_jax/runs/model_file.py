"""A meta-trained model as one file: its parameters, those of the inner update, and a description.

The file is msgpack of arrays and text. Reading it builds arrays, dicts and lists, and executes nothing.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax.runs.files import make_directory, plain, write
from maml_jax.types import InnerParams, Params

FORMAT = "maml_jax 1"


class Saved(NamedTuple):
    """What a file held."""

    params: Params
    """Nested dicts of arrays; `restore` gives them the structure of other parameters."""
    inner_params: InnerParams
    """Learned parameters of the inner update, the same; `()` where none are learned."""
    description: dict[str, Any]
    """Model, protocol, and whatever else was saved beside."""


def save(
    path: str | Path, params: Params, inner_params: InnerParams = (), description: dict[str, Any] | None = None
) -> Path:
    """Writes a file, in one piece: whoever reads it sees the old content or the new.

    Args:
      path: where.
      params: any pytree of arrays, such as a state of nnx or a module of equinox.
      rates: the same for the learned rates.
      description: a dict of what JSON takes, and of NumPy's and JAX's numbers and arrays; what is not finite becomes
        None.

    Raises:
      TypeError: for a leaf that is no array or number, or a description that JSON does not take.
      ValueError: for leaves whose names are the same as text.
      OSError: if the file cannot be written.
    """
    from flax import serialization

    if not isinstance(description, dict | None):
        raise TypeError(f"description must be a dict, but got {description!r}.")
    try:
        about = json.dumps(plain(description or {}))
    except TypeError as error:
        raise TypeError(f"description must hold only what JSON takes, but {error}.") from error
    content = serialization.msgpack_serialize(
        {
            "format": FORMAT,
            "description": about,
            "params": _nested("params", params),
            "inner_params": _nested("inner_params", inner_params),
        }
    )
    path = Path(path)
    make_directory(path.parent)
    return write(path, content)


def load(path: str | Path) -> Saved:
    """Reads a file that `save` wrote.

    `restore(like, saved.params)` gives it the structure of other parameters.

    Raises:
      ValueError: if the file is not such a file, or damaged.
      OSError: if it cannot be read.
    """
    from flax import serialization

    try:
        content = serialization.msgpack_restore(Path(path).read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
        description = json.loads(content["description"])
        inner_params = content["inner_params"]
        none = inner_params is None or (isinstance(inner_params, dict) and not inner_params)
        return Saved(content["params"], () if none else inner_params, description)
    except OSError:
        raise
    except Exception as error:  # Whatever the bytes of another file lead to.
        raise ValueError(f"{path} is not a file of maml_jax.save, or damaged: {error!r}.") from error


def restore(like: Any, values: Any) -> Any:
    """`values`, as `load` gives them, in the structure of `like`, whose numbers play no part.

    Raises:
      ValueError: naming the leaf that the one has and the other has not, or whose shape is another.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    missing = object()

    def find(path: Any, leaf: Any) -> Any:
        found = values
        for key in path:
            found = found.get(_name(key), missing) if isinstance(found, dict) else missing
        if found is missing or isinstance(found, dict):
            raise ValueError(f"The saved values have nothing at {jax.tree_util.keystr(path) or 'the top'}.")
        if np.shape(found) != np.shape(leaf):
            raise ValueError(
                f"At {jax.tree_util.keystr(path) or 'the top'} the saved values have shape {np.shape(found)} in place "
                f"of {np.shape(leaf)}."
            )
        return jnp.asarray(found)

    leaves = [find(path, leaf) for path, leaf in paths]
    known = {tuple(map(_name, path)) for path, _ in paths}
    for path, _ in jax.tree_util.tree_leaves_with_path(values):
        if tuple(map(_name, path)) not in known:
            raise ValueError(f"The saved values have {jax.tree_util.keystr(path)}, for which there is no place.")
    return jax.tree.unflatten(structure, leaves)


def _name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def _nested(name: str, tree: Any) -> Any:
    """Nested dicts of arrays, by the path to each leaf."""
    nested: Any = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
            given = f"{name}{jax.tree_util.keystr(path)} is {leaf!r}"
            raise TypeError(f"{name} must hold arrays and numbers alone, but {given}. A description is given last.")
        if not path:
            return array
        place = nested
        for key in path[:-1]:
            place = place.setdefault(_name(key), {}) if isinstance(place, dict) else place
        if not isinstance(place, dict) or _name(path[-1]) in place:
            raise ValueError(f"{name} holds two leaves that are both called {jax.tree_util.keystr(path)} as text.")
        place[_name(path[-1])] = array
    return nested
