"""A meta-trained model in one file: parameters, learned parameters of the inner update, and a description.

The file holds arrays and text in the msgpack format. `load` builds arrays and dicts from a file, and executes no code
of the file.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax.runs.files import to_jsonable, write_file
from maml_jax.types import InnerParams, Params

FORMAT = "maml_jax 1"


class Saved(NamedTuple):
    """The content of a model file."""

    params: Params
    """Nested dicts of arrays. `restore` gives the arrays the structure of the model's parameters."""
    inner_params: InnerParams
    """Learned parameters of the inner update, also nested dicts; `()` if none are learned."""
    description: dict[str, Any]
    """The description that was saved with the parameters."""


def save(
    path: str | Path, params: Params, inner_params: InnerParams = (), description: dict[str, Any] | None = None
) -> Path:
    """Saves parameters to a file. An existing file is replaced atomically.

    Args:
      path: the file; missing directories are created.
      params: any pytree of arrays, such as a linen dict, an nnx state or an equinox module.
      inner_params: learned parameters of the inner update, `MetaState.inner_params`.
      description: JSON-serialisable values, and numbers and arrays of NumPy and JAX. NaN and infinity become None.

    Returns:
      The path of the file.

    Raises:
      TypeError: if a leaf is not an array or a number, or if JSON cannot hold the description.
      ValueError: if two leaves have the same path as text, such as the keys `1` and `"1"`.
      OSError: if the file cannot be written.

    Example:
      >>> import pathlib, tempfile
      >>> path = save(pathlib.Path(tempfile.mkdtemp()) / "model", {"w": jnp.ones(3)}, description={"ways": 5})
      >>> saved = load(path)
      >>> saved.params["w"].tolist(), saved.inner_params, saved.description
      ([1.0, 1.0, 1.0], (), {'ways': 5})
    """
    from flax import serialization

    if not isinstance(description, dict | None):
        raise TypeError(f"description must be a dict, but got {description!r}.")
    try:
        text = json.dumps(to_jsonable(description or {}))
    except TypeError as error:
        raise TypeError(f"description must hold only JSON-serialisable values: {error}.") from error
    content = serialization.msgpack_serialize(
        {
            "format": FORMAT,
            "description": text,
            "params": _nested("params", params),
            "inner_params": _nested("inner_params", inner_params),
        }
    )
    return write_file(Path(path), content)


def load(path: str | Path) -> Saved:
    """Reads a file that `save` wrote; see `save` for an example.

    `restore(like, load(path).params)` gives the parameters the structure of `like`.

    Raises:
      ValueError: if the file was not written by `save`, or is damaged.
      OSError: if the file cannot be read.
    """
    from flax import serialization

    try:
        content = serialization.msgpack_restore(Path(path).read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
        description = json.loads(content["description"])
        inner_params = content["inner_params"]
        empty = isinstance(inner_params, dict) and not inner_params
        return Saved(content["params"], () if empty else inner_params, description)
    except OSError:
        raise
    except Exception as error:  # Other files can raise any exception.
        raise ValueError(f"{path} is not a file of maml_jax.save, or is damaged: {error!r}.") from error


def restore(like: Any, values: Any) -> Any:
    """Gives loaded parameters the structure of a model's parameters.

    Args:
      like: a pytree with the structure and shapes of the result, such as new parameters of the model. The values of
        `like` are not used.
      values: nested dicts of arrays, `Saved.params` or `Saved.inner_params`.

    Returns:
      The arrays of `values` in the structure of `like`.

    Raises:
      ValueError: if a leaf is missing on one side, or if shapes differ; the message names the leaf.

    Example:
      >>> restore([jnp.zeros(2)], {"0": np.ones(2)})
      [Array([1., 1.], dtype=float32)]
    """
    # Find the array of each leaf.
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    missing = object()

    def find(path: Any, leaf: Any) -> Any:
        found = values
        for key in path:
            found = found.get(_name(key), missing) if isinstance(found, dict) else missing
        if found is missing or isinstance(found, dict):
            raise ValueError(f"The saved values have no array at {jax.tree_util.keystr(path) or 'the top'}.")
        if np.shape(found) != np.shape(leaf):
            raise ValueError(
                f"At {jax.tree_util.keystr(path) or 'the top'} the saved values must have shape {np.shape(leaf)}, but "
                f"have {np.shape(found)}."
            )
        return jnp.asarray(found)

    leaves = [find(path, leaf) for path, leaf in paths]
    # Check that every array was found.
    known = {tuple(map(_name, path)) for path, _ in paths}
    for path, _ in jax.tree_util.tree_leaves_with_path(values):
        if tuple(map(_name, path)) not in known:
            raise ValueError(f"The saved values have an array at {jax.tree_util.keystr(path)}, but the model has none.")
    return jax.tree.unflatten(structure, leaves)


def _name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def _nested(name: str, tree: Any) -> Any:
    """Converts a pytree to nested dicts of arrays, with the path of a leaf as keys."""
    nested: Any = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
            raise TypeError(
                f"{name} must hold only arrays and numbers, but {name}{jax.tree_util.keystr(path)} is {leaf!r}. Give "
                "texts in description."
            )
        if not path:
            return array
        node = nested
        for key in path[:-1]:
            node = node.setdefault(_name(key), {}) if isinstance(node, dict) else node
        if not isinstance(node, dict) or _name(path[-1]) in node:
            raise ValueError(f"{name} holds two leaves with the same path as text, {jax.tree_util.keystr(path)}.")
        node[_name(path[-1])] = array
    return nested
