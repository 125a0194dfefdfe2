"""The allow list of globals in public weight files, and the inert values that stand in for them.

Classes of networks become `Inert` records; constructors of containers, tensors, numbers and paths are
replaced by functions of this module with the same effect on plain values. Anything else is refused.

A few bytes can describe nested shared lists that expand to more values than fit into memory. So no value
is formatted, hashed or compared before its type is known, and then only text and numbers are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGES.values()}
# Classes whose instances are kept as records: torch's layers and the modules of the YOLO family.
NETWORK_CLASS = re.compile(
    r"(torch\.nn\.(modules|parallel)(\.\w+)*|(yolov5\.)?(models(\.\w+)+|utils\.(activations|torch_utils)))"
    r"\.([A-Z]\w*|autoShape|_LinearWithBias)"
)
NUMPY_NUMBER = re.compile("[<>=](b1|[iu][1248]|f[248])")
MAX_DIMENSIONS = 16
MAX_EMPTY = 1 << 16  # product of the non-zero dimensions of an empty tensor
MAX_NUMBER_BYTES = 16  # of a NumPy scalar
MAX_KEY_BITS = 60  # of an integer key: longer ones can be chosen so that all hashes collide
_MAX_SHOWN = 100
RECORDS = {f"datetime.{name}" for name in ("date", "datetime", "timedelta", "timezone")} | {
    "argparse.Namespace"
}
PATH_CLASS = re.compile(r"pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path")
NUMPY_CORE = re.compile(r"numpy\.(_core|core)\.(multiarray|numeric)")


@dataclass(frozen=True)
class Name:
    """A global that the file names, already checked against the allow list."""

    module: str
    name: str

    def __str__(self) -> str:
        """The dotted name."""
        return f"{self.module}.{self.name}"


@dataclass(eq=False, repr=False)
class Inert:
    """An object that the file describes: its class by name, and its attributes."""

    kind: str
    arguments: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Storage:
    """A tensor storage as a pickle refers to it: dtype, key of its record, number of elements."""

    dtype: torch.dtype
    key: str
    count: int


@dataclass(eq=False, repr=False)
class NumpyType:
    """A NumPy dtype by its short code (`f8`) and byte order."""

    code: str
    order: str = "<"


class RefusedError(Exception):
    """The file contains something that is not allowed, or exceeds a limit."""


def shown(text: str) -> str:
    """Return a text, truncated for use in a message."""
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def text_items(mapping: Any) -> list[tuple[str, Any]]:
    """Return a dict's entries with text keys; an empty list if it is not a dict."""
    if not isinstance(mapping, dict):
        return []
    return [(key, value) for key, value in mapping.items() if isinstance(key, str)]


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_rest: Any) -> Tensor:
    """Return a view of a flat storage. Raises ValueError if it lies outside or has more elements."""
    listed = isinstance(size, list | tuple) and isinstance(stride, list | tuple)
    if not isinstance(storage, Tensor) or not listed or not len(size) == len(stride) <= MAX_DIMENSIONS:
        raise ValueError("a tensor has no proper size")
    sizes, strides = [*size], [*stride]
    whole = all(type(x) is int and x >= 0 for x in (offset, *sizes, *strides))
    # A billion empty rows take no space in the file, but become a billion lists.
    if not whole or (0 in sizes and math.prod(x for x in sizes if x) > MAX_EMPTY):
        raise ValueError("a tensor has no proper size")
    count = math.prod(sizes)
    end = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) if count else offset
    if count > storage.numel() or (count and end >= storage.numel()):
        raise ValueError("a tensor reaches outside of its storage")
    return storage.as_strided(sizes, strides, offset)


def _first(value: Any, *_rest: Any) -> Any:
    return value


def usable_key(value: Any) -> Any:
    """Return a value that may be a dict key or set member. Raises ValueError for others.

    Containers are refused: hashing nested tuples recurses without a depth limit.
    """
    if isinstance(value, int) and value.bit_length() > MAX_KEY_BITS:
        raise ValueError(f"a number of more than {MAX_KEY_BITS} bits is a key")
    if value is None or isinstance(value, str | bytes | int | float | Name | Inert):
        return value
    raise ValueError(f"a {type(value).__name__} is a key")


def dict_of(pairs: Iterable[Any]) -> dict[Any, Any]:
    """Return a dict of key and value pairs."""
    return {usable_key(key): value for key, value in pairs}


def _dict_from(items: Any = (), *_rest: Any) -> dict[Any, Any]:
    return (
        dict(items) if isinstance(items, dict) else dict_of(items if isinstance(items, list | tuple) else ())
    )


def in_twos(items: list[Any]) -> Iterable[tuple[Any, Any]]:
    """Return consecutive items in pairs. Raises ValueError for an odd count."""
    return zip(items[::2], items[1::2], strict=True)


def _sequence(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    def build(items: Any = ()) -> Any:
        if not isinstance(items, list | tuple | set | frozenset):
            raise ValueError(f"a container is made of {type(items).__name__}")
        return kind(items if kind in (list, tuple) else map(usable_key, items))

    return build


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise ValueError("it encodes what is not text")
    return text.encode(encoding)


def _path(*parts: Any) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("a path is made of what is not text")
    return "/".join(parts).replace("//", "/")


def _numpy_type(code: Any, *_rest: Any) -> NumpyType:
    if not isinstance(code, str):
        raise ValueError("a numpy type has no proper code")
    return NumpyType(code)


def _object(name: Any, *_rest: Any) -> Inert:
    if not isinstance(name, Name):
        raise ValueError("an object has no proper class")
    return Inert(str(name))


def _number(dtype: Any, content: Any = b"\0" * 8) -> Any:
    """Return a NumPy scalar from its bytes."""
    if isinstance(content, bytes) and len(content) > MAX_NUMBER_BYTES:
        raise ValueError("a numpy number is too long")
    return NumpyArray((), dtype, content).value()


@dataclass(eq=False, repr=False)
class NumpyArray:
    """A NumPy array under construction: a pickle first creates an empty one, then fills it."""

    shape: tuple[int, ...] = ()
    dtype: Any = None
    content: Any = b""

    def value(self) -> Any:
        """Return a number for a 0-d array, else a flat list. Raises ValueError if it is not numeric."""
        if not isinstance(self.dtype, NumpyType) or not isinstance(self.content, bytes):
            raise ValueError("a numpy array has no proper content")
        kind = self.dtype.order + self.dtype.code
        if not NUMPY_NUMBER.fullmatch(kind):
            raise ValueError(f"a numpy array is of type {shown(self.dtype.code)}")
        found = np.frombuffer(self.content, kind).tolist()
        return found[0] if self.shape == () and len(found) == 1 else found


CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.Size": _sequence(tuple),
    "torch.device": _first,
    "collections.OrderedDict": _dict_from,
    "collections.defaultdict": lambda _factory=None, items=(): _dict_from(items),
    "collections.Counter": _dict_from,
    "builtins.dict": _dict_from,
    "builtins.list": _sequence(list),
    "builtins.tuple": _sequence(tuple),
    "builtins.set": _sequence(set),
    "builtins.frozenset": _sequence(frozenset),
    "builtins.complex": _first,
    "_codecs.encode": _encoded,
    "numpy.dtype": _numpy_type,
    "numpy.ndarray": lambda *_rest: NumpyArray(),
    "copyreg._reconstructor": _object,
}
# Allowed only as arguments of the constructors above.
ARGUMENTS = {"builtins.object", "builtins.int", "builtins.float"}


def constructor(name: Name) -> Callable[..., Any]:
    """Return the function that stands in for a global. Raises RefusedError if it is not on the list."""
    text = str(name)
    if text in CONSTRUCTORS:
        return CONSTRUCTORS[text]
    if NETWORK_CLASS.fullmatch(text) or text in RECORDS:
        return lambda *arguments: Inert(text, arguments)
    if PATH_CLASS.fullmatch(text):
        return _path
    if NUMPY_CORE.fullmatch(name.module):
        return _number if name.name == "scalar" else lambda *_rest: NumpyArray()
    raise RefusedError(f"it calls {text}")


def is_known(name: Name) -> bool:
    """Return whether a global is on the allow list."""
    text = str(name)
    if name.module == "torch":
        return name.name in STORAGES or name.name in DTYPES or text in CONSTRUCTORS
    if NUMPY_CORE.fullmatch(name.module):
        return name.name in ("scalar", "_reconstruct")
    return bool(
        text in CONSTRUCTORS
        or text in ARGUMENTS
        or text in RECORDS
        or PATH_CLASS.fullmatch(text)
        or NETWORK_CLASS.fullmatch(text)
    )
