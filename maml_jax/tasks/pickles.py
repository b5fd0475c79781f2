"""Safe reading of pickled image data sets: no code that a pickle names is executed.

Unpickling normally calls any function that the file names. This module replaces the few names that arrays need by its
stand-ins, and raises DataError for any other name. The constructors of NumPy are not called either, because a pickle
can forge their state. Arrays are built after reading, from the recorded type, shape and bytes alone.
"""

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import numpy as np

from maml_jax.tasks.cache import DataError

FORMS = (("image_data", "class_dict"), ("data", "labels"))
"""Keys of the pixels and of the classes in the two known forms of pickles."""


class PickledImages(NamedTuple):
    """The images of one split."""

    images: np.ndarray
    """uint8 `[n, H, W, 3]`, RGB."""
    classes: dict[str, np.ndarray]
    """`{class: indices of the images of the class}`."""


def images(file: IO[bytes], where: str) -> PickledImages:
    """Reads a pickled split.

    Two forms are known: `{'image_data': [n, H, W, 3], 'class_dict': {name: indices}}`, as in
    `mini-imagenet-cache-train.pkl`, and `{'data': [n, H, W, 3], 'labels': [n]}`, as for CIFAR-FS and FC100. In the
    second form, the name of a class is its label.

    Args:
      file: the open pickle.
      where: the name of the file in error messages.

    Returns:
      The pixels, and the indices of the images of each class.

    Raises:
      DataError: if the pickle is damaged, has another form, lists an image twice, or calls a function.

    Example:
      >>> import io
      >>> split = {"data": np.zeros((3, 84, 84, 3), np.uint8), "labels": [7, 8, 7]}
      >>> images(io.BytesIO(pickle.dumps(split)), "split.pkl").classes
      {'7': array([0, 2]), '8': array([1])}
    """
    content = load(file, where)
    keys = {str(key) for key in content} if isinstance(content, dict) else set()
    name = next((name for name, other in FORMS if {name, other} <= keys), None)
    if name is None:
        raise DataError(
            f"{where} must hold a dict with 'image_data' and 'class_dict', or with 'data' and 'labels', but holds "
            f"{'a dict of ' + ', '.join(sorted(keys)) if keys else _describe(content)}."
        )
    pixels = content[name]
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[3] == 3):
        raise DataError(
            f"{name!r} in {where} must be a uint8 array of shape [n, height, width, 3], but is {_describe(pixels)}."
        )
    members = _by_name(content["class_dict"], where) if name == "image_data" else _by_label(content["labels"], where)
    listed = sum(map(len, members.values()))
    if name == "data" and listed != len(pixels):
        raise DataError(f"{where} holds {len(pixels):,} images, but {listed:,} labels.")
    used = np.zeros(len(pixels), bool)
    for name, indices in members.items():
        if len(indices) and not (0 <= indices.min() and indices.max() < len(pixels)):
            raise DataError(f"Class {name} in {where} has indices beyond the {len(pixels):,} images.")
        if used[indices].any() or len(set(indices.tolist())) < len(indices):
            raise DataError(f"Class {name} in {where} has images that are listed more than once.")
        used[indices] = True
    return PickledImages(pixels, members)


def _by_name(listed: Any, where: str) -> dict[str, np.ndarray]:
    if not isinstance(listed, dict):
        raise DataError(f"'class_dict' in {where} must map names to indices, but is {_describe(listed)}.")
    return {str(name): _integers(indices, f"class {name} in {where}") for name, indices in listed.items()}


def _by_label(labels: Any, where: str) -> dict[str, np.ndarray]:
    labels = _integers(labels, f"'labels' in {where}")
    return {str(label): np.flatnonzero(labels == label) for label in np.unique(labels).tolist()}


def load(file: IO[bytes], where: str) -> Any:
    """Unpickles numbers, strings, arrays of numbers, and dicts and lists of these values.

    Args:
      file: the open pickle.
      where: the name of the file in error messages.

    Raises:
      DataError: if the pickle is damaged, or calls a function that these values do not need; the message names the
        function.

    Example:
      >>> import io
      >>> load(io.BytesIO(pickle.dumps({"labels": np.arange(3)})), "labels.pkl")
      {'labels': array([0, 1, 2])}
    """
    try:
        return _build(_Unpickler(file, where).load())
    except DataError:
        raise
    except Exception as error:  # A damaged pickle can raise any exception.
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
        # `encoding="latin1"` reads the bytes of Python 2 as text.
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        return np.frombuffer(data, self.type.dtype()).reshape(self.shape, order="F" if self.fortran else "C")


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> _Array:
    """Stands in for `numpy._core.numeric._frombuffer`, which NumPy pickles with protocol 5."""
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", data))
    return array


def _scalar(kind: Any, data: Any) -> Any:
    return _from_buffer(data, kind, (), "C").array().item()


def _encode(text: str, encoding: str) -> bytes:
    """Stands in for `_codecs.encode`, with which Python 3 pickles bytes in old protocols."""
    if encoding != "latin1":
        raise ValueError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


class _Callable(NamedTuple):
    """A function that a pickle may call. The class is a tuple, because a pickle cannot set attributes of a tuple."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


_STAND_INS = {
    ("numpy", "ndarray"): _Callable(lambda *_: _Array()),
    ("numpy", "dtype"): _Callable(_Type),
    ("_codecs", "encode"): _Callable(_encode),
    ("collections", "OrderedDict"): _Callable(OrderedDict),
    **{
        (f"numpy.{core}.{module}", name): _Callable(function)
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", lambda *_: _Array()),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], where: str):
        super().__init__(file, encoding="latin1")  # NumPy requires this encoding for pickles of Python 2.
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise DataError(
                f"The pickle {self._where} calls {module}.{name}, which is not allowed: only arrays of numbers, text, "
                "dicts and lists are read from a pickle. Get the data from a source that you trust."
            )
        return _STAND_INS[module, name]


def _build(content: Any) -> Any:
    """Replaces stand-ins by arrays, in nested dicts and in the lists that they hold."""
    if isinstance(content, _Array):
        return content.array()
    if isinstance(content, dict):
        return {key: _build(value) for key, value in content.items()}
    if isinstance(content, list | tuple) and any(isinstance(value, _Array) for value in content):
        return [_build(value) for value in content]
    return content


def _integers(values: Any, name: str) -> np.ndarray:
    try:
        numbers = np.asarray(values if len(values) else np.array([], int))
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must be a list of integers, but is {_describe(values)}.") from error
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise DataError(f"{name} must be a list of integers, but is {_describe(numbers)}.")
    return numbers


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and type {value.dtype}"
    return f"a value of type {type(value).__name__}"
