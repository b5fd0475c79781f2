"""What meta-training has learned as one file: parameters, rates, and a description of what they are for.

The file is msgpack of arrays and text. Reading it builds arrays, dicts and lists, and executes nothing.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from maml_jax.types import Params, Rates
from maml_jax.workdir import make_directory, write

FORMAT = "maml_jax 1"


class Saved(NamedTuple):
    """What a file held."""

    params: Params
    """Nested dicts of arrays."""
    rates: Rates
    """Learned rates of the inner loop; `()` where none are learned."""
    description: dict[str, Any]
    """Model, protocol, and whatever else was saved beside."""


def save(path: str | Path, params: Params, rates: Rates = (), description: dict[str, Any] | None = None) -> Path:
    """Writes a file, in one piece: whoever reads it sees the old content or the new.

    Args:
      path: where.
      params: nested dicts (lists and tuples become dicts by index) of arrays.
      rates: the same for the learned rates.
      description: anything that JSON takes.
    """
    from flax import serialization

    content = serialization.msgpack_serialize(
        {
            "format": FORMAT,
            "description": json.dumps(description or {}),
            "params": _arrays(params),
            "rates": _arrays(rates),
        }
    )
    path = Path(path)
    make_directory(path.parent)
    return write(path, content)


def load(path: str | Path) -> Saved:
    """Reads a file that `save` wrote.

    `flax.serialization.from_state_dict(like, saved.params)` gives it the structure of other parameters.

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
        return Saved(content["params"], content["rates"] or (), description)
    except OSError:
        raise
    except Exception as error:  # Whatever the bytes of another file lead to.
        raise ValueError(f"{path} is not a file of maml_jax.saved.save, or damaged: {error!r}.") from error


def _arrays(tree: Any) -> Any:
    from flax import serialization

    return serialization.to_state_dict(jax.tree.map(np.asarray, tree))
