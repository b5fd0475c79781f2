"""A meta-trained model in one file: parameters, learned parameters of the inner update, and a description.

The file is in the msgpack format: a header in JSON with its checksum, and the bytes of each array. The header has the
description, and the path, type, shape and checksum of each array. `load` builds arrays and dicts from a file, and
executes no code of the file.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgpack
import numpy as np

from maml_jax.runs.files import to_jsonable, write_file
from maml_jax.types import InnerParams, Params

FORMAT = "maml_jax 2"


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
    if not isinstance(description, dict | None):
        raise TypeError(f"description must be a dict, but got {description!r}.")
    arrays = _arrays("params", params) | _arrays("inner_params", inner_params)
    contents = [array.tobytes() for array in arrays.values()]
    about = [
        {"path": path, "dtype": array.dtype.name, "shape": array.shape, "sha256": _digest(content)}
        for (path, array), content in zip(arrays.items(), contents)
    ]
    try:
        header = json.dumps({"description": to_jsonable(description or {}), "arrays": about})
    except TypeError as error:
        raise TypeError(f"description must hold only JSON-serialisable values: {error}.") from error
    content = {"format": FORMAT, "header": header, "sha256": _digest(header.encode()), "arrays": contents}
    return write_file(Path(path), msgpack.packb(content))


def load(path: str | Path) -> Saved:
    """Reads a file that `save` wrote; see `save` for an example.

    `restore(like, load(path).params)` gives the parameters the structure of `like`.

    Raises:
      ValueError: if the file was not written by `save`, or if the checksum of the header or of an array is wrong. The
        message names the array.
      OSError: if the file cannot be read.
    """
    header, contents = _unpack(Path(path))
    saved: dict[str, Any] = {"params": {}, "inner_params": {}}
    for about, content in zip(header["arrays"], contents, strict=True):
        if _digest(content) != about["sha256"]:
            raise ValueError(f"{path} is damaged: the array {'/'.join(about['path'])} has the wrong checksum.")
        array = np.frombuffer(content, about["dtype"]).reshape(about["shape"])
        *parents, name = about["path"]
        node = saved
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    inner_params = saved["inner_params"]
    empty = isinstance(inner_params, dict) and not inner_params
    return Saved(saved["params"], () if empty else inner_params, header["description"])


def _unpack(path: Path) -> tuple[dict[str, Any], list[bytes]]:
    """Returns the header of a file, whose checksum is right, and the bytes of the arrays."""
    try:
        content = msgpack.unpackb(path.read_bytes())
    except (ValueError, msgpack.UnpackException):
        content = None
    match content:
        case {"format": found, "description": _} if found != FORMAT:
            raise ValueError(f"{path} has the format {found!r}, but this version of maml_jax reads {FORMAT!r}.")
        case {"format": str(found), "header": str(header), "sha256": str(digest), "arrays": list(arrays)}:
            if found == FORMAT and digest == _digest(header.encode()):
                return json.loads(header), arrays
    raise ValueError(
        f"{path} is not a file of maml_jax.save, or is damaged: its description has a wrong checksum or cannot be read."
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def restore(like: Any, values: Any) -> Any:
    """Gives loaded parameters the structure of a model's parameters.

    Args:
      like: a pytree with the structure and shapes of the result, such as new parameters of the model. The values of
        `like` are not used.
      values: nested dicts of arrays, `Saved.params` or `Saved.inner_params`.

    Returns:
      The arrays of `values` in the structure of `like`, as JAX arrays. Without `jax_enable_x64`, JAX has no types of 64
      bits: arrays of these types stay NumPy arrays.

    Raises:
      ValueError: if a leaf is missing on one side, or if shapes differ; the message names the leaf.

    Example:
      >>> restore([jnp.zeros(2)], {"0": np.ones(2, np.float32)})
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
        array = jnp.asarray(found)
        return array if array.dtype == found.dtype else np.array(found)

    leaves = [find(path, leaf) for path, leaf in paths]
    # Check that every array was found.
    known = {tuple(map(_name, path)) for path, _ in paths}
    for path, _ in jax.tree_util.tree_leaves_with_path(values):
        if tuple(map(_name, path)) not in known:
            raise ValueError(f"The saved values have an array at {jax.tree_util.keystr(path)}, but the model has none.")
    return jax.tree.unflatten(structure, leaves)


def _name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def _arrays(name: str, tree: Any) -> dict[tuple[str, ...], np.ndarray]:
    """Returns the arrays of a pytree by path, in the byte order of this machine. Paths start with `name`."""
    arrays: dict[tuple[str, ...], np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
            raise TypeError(
                f"{name} must hold only arrays and numbers, but {name}{jax.tree_util.keystr(path)} is {leaf!r}. Give "
                "texts in description."
            )
        names = (name, *map(_name, path))
        if names in arrays:
            raise ValueError(f"{name} holds two leaves with the same path as text, {jax.tree_util.keystr(path)}.")
        arrays[names] = array.astype(array.dtype.newbyteorder("="), copy=False)
    for names in arrays:
        for length in range(1, len(names)):
            if names[:length] in arrays:
                raise ValueError(f"{name} holds two leaves with the same path as text, {'/'.join(names[1:length])}.")
    return arrays
