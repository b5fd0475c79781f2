"""Safe reading of pickled image data sets: no code that a pickle names is executed.

Unpickling normally calls any function that the file names. This module replaces the few names that arrays need by its
stand-ins, and raises DataError for any other name. The constructors of NumPy are not called either, because a pickle
can forge their state. Arrays are built after reading, from the recorded type, shape and bytes alone.

A pickle can refer to one value many times, so a short pickle could describe a value without end. Memory and time are
therefore bounded by the size of the file. No length in the pickle is trusted beyond the end of the file. The arrays and
texts that are built have at most twice the bytes of the file. Each dict and list is built once. A pickle has at most
`LARGEST_LENGTH` operations.
"""

import io
import os
import pickle
import re
import struct
import sys
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import numpy as np

from maml_jax.tasks.cache import DataError
from maml_jax.tasks.tree import readable

FORMS = (("image_data", "class_dict"), ("data", "labels"))
"""Keys of the pixels and of the classes in the two known forms of pickles."""
LARGEST_LENGTH = 1 << 23
"""The number of operations of the longest pickle that is read, about the number of its values, 8 million. MiniImagenet
has 40,000."""


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
    form = next((form for form in FORMS if {*form} <= keys), None)
    if form is None:
        raise DataError(
            f"{where} must hold a dict with 'image_data' and 'class_dict', or with 'data' and 'labels', but holds "
            f"{'a dict of ' + ', '.join(sorted(keys)) if keys else _describe(content)}."
        )
    name, other_key = form
    pixels = content[name]
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[3] == 3):
        raise DataError(
            f"{name!r} in {where} must be a uint8 array of shape [n, height, width, 3], but is {_describe(pixels)}."
        )
    read_classes = _by_name if name == "image_data" else _by_label
    members = read_classes(content[other_key], len(pixels), where)
    used = np.zeros(len(pixels), bool)
    for name, indices in members.items():
        if len(indices) and not (0 <= indices.min() and indices.max() < len(pixels)):
            raise DataError(f"Class {name} in {where} has indices beyond the {len(pixels):,} images.")
        if used[indices].any() or len(set(indices.tolist())) < len(indices):
            raise DataError(f"Class {name} in {where} has images that are listed more than once.")
        used[indices] = True
    return PickledImages(pixels, members)


def _by_name(listed: Any, count: int, where: str) -> dict[str, np.ndarray]:
    if not isinstance(listed, dict):
        raise DataError(f"'class_dict' in {where} must map names to indices, but is {_describe(listed)}.")
    classes: dict[str, np.ndarray] = {}
    total = 0
    for key, values in listed.items():
        name = readable(str(key))
        indices = _integers(values, f"class {name} in {where}")
        total += len(indices)
        if total > count or name in classes:
            raise DataError(f"Class {name} in {where} has images that are listed more than once.")
        classes[name] = indices
    return classes


def _by_label(listed: Any, count: int, where: str) -> dict[str, np.ndarray]:
    labels = _integers(listed, f"'labels' in {where}")
    if len(labels) != count:
        raise DataError(f"{where} holds {count:,} images, but {len(labels):,} labels.")
    order = np.argsort(labels, kind="stable")
    values, first = np.unique(labels[order], return_index=True)
    return {str(label): indices for label, indices in zip(values.tolist(), np.split(order, first[1:]))}


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
        reader = _Unpickler(_Bounded(file), where)
        return reader.build(reader.load())
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


class _Callable(NamedTuple):
    """A function that a pickle may call. The class is a tuple, because a pickle cannot set attributes of a tuple."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


_STAND_INS = {
    ("numpy", "ndarray"): _Callable(lambda *_: _Array()),
    ("numpy", "dtype"): _Callable(_Type),
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


class _Bounded:
    """A file from which no more bytes are requested than it has, because `open` allocates all requested bytes."""

    def __init__(self, file: IO[bytes]):
        self._file, self.position = file, 0
        on_disk = isinstance(file, io.BufferedReader)
        self._size = os.fstat(file.fileno()).st_size - file.tell() if on_disk else sys.maxsize

    def read(self, count: int) -> bytes:
        if count > self._size - self.position:
            raise EOFError(f"{count:,} bytes are missing")
        return self._advance(self._file.read(count))

    def readline(self) -> bytes:
        return self._advance(self._file.readline())

    def _advance(self, data: bytes) -> bytes:
        self.position += len(data)
        return data


class _Operations(dict):
    """The operations of a pickle, of which at most `LARGEST_LENGTH` are executed."""

    count = 0

    def __getitem__(self, code: int) -> Any:
        self.count += 1
        if self.count > LARGEST_LENGTH:
            raise ValueError(f"more than {LARGEST_LENGTH:,} values")
        return super().__getitem__(code)


_PythonUnpickler: Any = pickle._Unpickler


class _Unpickler(_PythonUnpickler):
    """Reads a pickle in Python: the reader in C allocates memory for the largest index that a pickle names."""

    def __init__(self, file: _Bounded, where: str):
        super().__init__(file, encoding="latin1")  # NumPy requires this encoding for pickles of Python 2.
        self._where, self._file, self._taken = where, file, 0
        self._stand_ins = {
            **_STAND_INS,
            ("_codecs", "encode"): _Callable(self._encode),
            ("collections", "OrderedDict"): _Callable(self._dict),
        }
        operations = {
            pickle.SETITEM: _Unpickler._load_setitem,
            pickle.SETITEMS: _Unpickler._load_setitems,
            pickle.DICT: _Unpickler._load_dict,
            pickle.EMPTY_SET: _Unpickler._load_set,
            pickle.FROZENSET: _Unpickler._load_set,
            pickle.BYTEARRAY8: _Unpickler._load_bytearray8,
        }
        self.dispatch = _Operations(
            {**_PythonUnpickler.dispatch, **{code[0]: load for code, load in operations.items()}}
        )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._stand_ins:
            raise DataError(
                f"The pickle {self._where} calls {module}.{name}, which is not allowed: only arrays of numbers, text, "
                "dicts and lists are read from a pickle. Get the data from a source that you trust."
            )
        return self._stand_ins[module, name]

    def build(self, content: Any) -> Any:
        """Replaces stand-ins by arrays, in nested dicts and in the lists that they hold."""
        built: dict[int, Any] = {}  # By identity, so that a value with many references is built once.

        def of(value: Any) -> Any:
            if id(value) in built:
                return built[id(value)]
            if isinstance(value, _Array):
                self._take(len(value.data))
                built[id(value)] = value.array()
            elif isinstance(value, dict):
                result: dict[Any, Any] = {}
                built[id(value)] = result
                result.update((key, of(entry)) for key, entry in value.items())
            elif isinstance(value, list | tuple) and any(isinstance(entry, _Array) for entry in value):
                built[id(value)] = [of(entry) if isinstance(entry, _Array) else entry for entry in value]
            else:
                built[id(value)] = value
            return built[id(value)]

        return of(content)

    def _take(self, count: int) -> None:
        self._taken += count
        if self._taken > 2 * self._file.position:  # Old protocols have the bytes of an array as text.
            raise ValueError("arrays and texts of more than twice the bytes of the file")

    def _encode(self, text: str, encoding: str) -> bytes:
        """Stands in for `_codecs.encode`, with which Python 3 pickles bytes in old protocols."""
        if encoding != "latin1":
            raise ValueError(f"text encoded as {encoding!r}")
        self._take(len(text))
        return text.encode("latin1")

    def _dict(self, pairs: Any = ()) -> dict:
        """Stands in for `collections.OrderedDict`."""
        self._take(len(pairs))
        return dict(map(self._checked_pair, pairs))

    @staticmethod
    def _checked_pair(pair: Any) -> Any:
        key, value = pair
        return _checked_key(key), value

    # Hashing a tuple of tuples can take time without end: dicts have simple keys, and sets are not read.

    def _load_setitem(self) -> None:
        _checked_key(self.stack[-2])
        super().load_setitem()

    def _load_setitems(self) -> None:
        for key in self.stack[::2]:
            _checked_key(key)
        super().load_setitems()

    def _load_dict(self) -> None:
        for key in self.stack[::2]:
            _checked_key(key)
        super().load_dict()

    def _load_set(self) -> None:
        raise ValueError("a set")

    def _load_bytearray8(self) -> None:
        (count,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(count))  # The method of the base class allocates all bytes before it reads.


def _checked_key(key: Any) -> Any:
    if not (isinstance(key, str | bytes) or (isinstance(key, int) and abs(key) < 1 << 32)):
        raise ValueError(f"a dict with a key of type {type(key).__name__}")
    return key


def _integers(values: Any, name: str) -> np.ndarray:
    if not isinstance(values, np.ndarray):
        if not (isinstance(values, list | tuple) and all(isinstance(value, int) for value in values)):
            raise DataError(f"{name} must be a list of integers, but is {_describe(values)}.")
        if any(abs(value) >= 1 << 62 for value in values):
            raise DataError(f"{name} must be a list of integers of 64 bits.")
    numbers = np.asarray(values) if len(values) else np.array([], int)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise DataError(f"{name} must be a list of integers, but is {_describe(numbers)}.")
    return numbers


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and type {value.dtype}"
    return f"a value of type {type(value).__name__}"
