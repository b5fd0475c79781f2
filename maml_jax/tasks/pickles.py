"""The pickled image sets in circulation, read without running anything that a pickle asks for.

Unpickling calls whatever functions the file names. Here a name finds one of a few stand-ins of this file, or
ends the reading: not even NumPy's own constructors are handed to the pickle, since their state can be forged.
An array is made from its recorded type, shape and bytes only, after the reading.
"""

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import numpy as np

from maml_jax.tasks.cache import DataError

FORMS = (("image_data", "class_dict"), ("data", "labels"))


class PickledImages(NamedTuple):
    """The images of one split."""

    images: np.ndarray
    """uint8 `[n, H, W, 3]`, RGB."""
    classes: dict[str, np.ndarray]
    """Indices of each class's images."""


def images(file: IO[bytes], where: str) -> PickledImages:
    """Reads either form: `{'image_data': [n, H, W, 3], 'class_dict': {name: indices}}`, as in
    `mini-imagenet-cache-train.pkl`, or `{'data': [n, H, W, 3], 'labels': [n]}`, as for CIFAR-FS and FC100.

    In the second form a class is named by its label.

    Raises:
      DataError: if the pickle wants to call anything, is damaged, or holds something else.
    """
    content = load(file, where)
    keys = {str(key) for key in content} if isinstance(content, dict) else set()
    name = next((name for name, other in FORMS if {name, other} <= keys), None)
    if name is None:
        raise DataError(
            f"{where} must hold a dict with 'image_data' and 'class_dict', or with 'data' and 'labels', but holds "
            f"{'a dict of ' + ', '.join(sorted(keys)) if keys else _kind(content)}."
        )
    pixels = content[name]
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[3] == 3):
        raise DataError(f"The images in {where} must be uint8 of shape [n, height, width, 3], but are {_kind(pixels)}.")
    members = _by_name(content["class_dict"], where) if name == "image_data" else _by_label(content["labels"], where)
    listed = sum(map(len, members.values()))
    if name == "data" and listed != len(pixels):
        raise DataError(f"{where} holds {len(pixels):,} images, but {listed:,} labels.")
    used = np.zeros(len(pixels), bool)
    for name, indices in members.items():
        if len(indices) and not (0 <= indices.min() and indices.max() < len(pixels)):
            raise DataError(f"Class {name} in {where} has indices beyond the {len(pixels):,} images that are there.")
        if used[indices].any() or len(set(indices.tolist())) < len(indices):
            raise DataError(f"Class {name} in {where} has images that were listed before.")
        used[indices] = True
    return PickledImages(pixels, members)


def _by_name(listed: Any, where: str) -> dict[str, np.ndarray]:
    if not isinstance(listed, dict):
        raise DataError(f"'class_dict' in {where} must map names to indices, but is {_kind(listed)}.")
    return {str(name): _integers(indices, f"class {name} in {where}") for name, indices in listed.items()}


def _by_label(labels: Any, where: str) -> dict[str, np.ndarray]:
    labels = _integers(labels, f"'labels' in {where}")
    return {str(label): np.flatnonzero(labels == label) for label in np.unique(labels).tolist()}


def load(file: IO[bytes], where: str) -> Any:
    """Unpickles arrays of numbers, numbers, text and containers of them.

    Raises:
      DataError: naming what else the pickle wants to call, or that it is damaged.
    """
    try:
        return _made(_Unpickler(file, where).load())
    except DataError:
        raise
    except Exception as error:  # What a damaged pickle raises is not limited by its documentation.
        raise DataError(f"The pickle {where} is damaged, or holds more than arrays and lists ({error!r}).") from error


class _Type:
    """Stands in for `numpy.dtype`."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any):
        self.code, self.order = code, "|"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def dtype(self) -> np.dtype:
        if not (isinstance(self.code, str) and re.fullmatch(r"[biuf][1248]", self.code) and self.order in "<>=|"):
            raise ValueError(f"arrays of type {self.code!r}")
        return np.dtype(self.order.replace("|", "=") + self.code)


class _Array:
    """Stands in for `numpy.ndarray`."""

    __slots__ = ("data", "fortran", "shape", "type")

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.type, self.fortran, self.data = state

    def array(self) -> np.ndarray:
        # Text is what Python 2's bytes become in Python 3.
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        return np.frombuffer(data, self.type.dtype()).reshape(self.shape, order="F" if self.fortran else "C")


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> _Array:
    """Stands in for what NumPy pickles with protocol 5."""
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", data))
    return array


def _scalar(kind: Any, data: Any) -> Any:
    return _from_buffer(data, kind, (), "C").array().item()


def _encode(text: str, encoding: str) -> bytes:
    """Stands in for `_codecs.encode`, by which Python 3 writes bytes with an old protocol."""
    if encoding != "latin1":
        raise ValueError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


class _Callable(NamedTuple):
    """Something that a pickle may call; a tuple, so that it can set no attribute of it."""

    made: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.made(*args)


_STAND_INS = {
    ("numpy", "ndarray"): _Callable(lambda *_: _Array()),
    ("numpy", "dtype"): _Callable(_Type),
    ("_codecs", "encode"): _Callable(_encode),
    ("collections", "OrderedDict"): _Callable(OrderedDict),
    **{
        (f"numpy.{core}.{module}", name): _Callable(made)
        for core in ("core", "_core")
        for module, name, made in (
            ("multiarray", "_reconstruct", lambda *_: _Array()),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], where: str):
        super().__init__(file, encoding="latin1")  # Which NumPy asks for, to read what Python 2 wrote.
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise DataError(
                f"The pickle {self._where} wants to call {module}.{name}. Only arrays of numbers, text and lists are "
                "read from a pickle, and nothing is run: get the data from a source that you trust."
            )
        return _STAND_INS[module, name]


def _made(content: Any) -> Any:
    """Arrays where their stand-ins are, down to the dicts and lists within the outermost dict."""
    if isinstance(content, _Array):
        return content.array()
    if isinstance(content, dict):
        return {key: _made(value) for key, value in content.items()}
    if isinstance(content, list | tuple) and any(isinstance(value, _Array) for value in content):
        return [_made(value) for value in content]
    return content


def _integers(values: Any, what: str) -> np.ndarray:
    try:
        numbers = np.asarray(values if len(values) else np.array([], int))
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} must be a list of integers, but is {_kind(values)}.") from error
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise DataError(f"{what} must be a list of integers, but is {_kind(numbers)}.")
    return numbers


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and type {value.dtype}"
    return f"of type {type(value).__name__}"
