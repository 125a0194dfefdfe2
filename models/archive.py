"""Reading of zip weight files that hold pickled objects, and of the networks in them.

`foreign` interprets the pickle instructions; this module reads the zip records and tensor storages, and
walks the module tree of a recorded network.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.foreign import Machine
from models.inert import Inert, NumpyArray, RefusedError, Storage, shown, text_items
from utils.errors import UserError

MAX_PICKLE_BYTES = 8 << 20  # public files have less than 1 MB; one byte can create a 64-byte list
MAX_ENTRIES = 100_000  # modules and weights of a network, repeated references included
MAX_NAME = 1000  # characters of a weight's name
MAX_PLAIN_DEPTH = 12
MAX_PLAIN_VALUES = 16384
EXPORTED = (".onnx", ".torchscript")  # single-file formats of export.py
FROM_PT = "it cannot be trained or taught from: give the .pt that it was made from"
_TEXT_UNIT = 64  # characters of text that count as one more value
_MAX_TOLD = 300  # characters quoted from a library's error message
# Exceptions that reading a damaged file can raise.
DAMAGE = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    RuntimeError,
    struct.error,
)


def load_content(path: Path) -> Any:
    """Load the content of a zip weight file: containers, numbers, text, tensors; Inert records of objects.

    Nothing in the file is executed. Our own files are read the same way: `torch.load(weights_only=True)`
    accepts them too, but a crafted file can crash it. Raises UserError if the file is not a zip weight
    file, could unpack to more than its own size, or names a global that is not part of a network.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _Records(archive, path.stat().st_size).load()
    except zipfile.BadZipFile as error:
        raise UserError(*_no_zip(path, error)) from error
    except RefusedError as error:
        is_exported = path.suffix.lower() in EXPORTED
        fix = FROM_PT if is_exported else "use weights from a source you trust"
        raise UserError(f"refused: {error}", path, fix) from error
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})", path, "check the path") from error
    except DAMAGE as error:
        fault = f"it is not an intact weight file ({str(error)[:_MAX_TOLD]})"
        raise UserError(fault, path, "fetch or copy the file again") from error


def module_state(root: Inert) -> dict[str, Tensor]:
    """Return the state dict of a recorded module: dotted names, tensors as stored in the file.

    The walk stops after `MAX_ENTRIES` entries, since modules in a file can contain one another.
    """
    state: dict[str, Tensor] = {}
    waiting: list[tuple[str, Any]] = [("", root)]
    left = MAX_ENTRIES
    while waiting and left > 0:
        prefix, module = waiting.pop()
        left -= 1
        if not isinstance(module, Inert):
            continue
        attributes = module.attributes
        passing = attributes.get("_non_persistent_buffers_set")
        listed = passing if isinstance(passing, set | list) else ()
        hidden = {name for name in listed if isinstance(name, str)}
        kinds = ("_parameters", "_buffers", "_modules")
        parameters, buffers, children = (text_items(attributes.get(kind)) for kind in kinds)
        left -= len(parameters) + len(buffers) + len(children) + len(listed)
        kept = [*parameters, *(entry for entry in buffers if entry[0] not in hidden)]
        for name, value in kept:
            if isinstance(value, Tensor) and len(prefix) + len(name) <= MAX_NAME:
                state[prefix + name] = value
        # The stack is last in, first out: reversed, so that names come in layer order.
        for name, child in reversed(children):
            if len(prefix) + len(name) <= MAX_NAME:
                waiting.append((f"{prefix}{name}.", child))
    return state


def submodules(root: Inert) -> Iterable[Inert]:
    """Yield the records of a module and all its submodules, each once, visiting at most `MAX_ENTRIES`."""
    seen: set[int] = set()
    waiting: list[Any] = [root]
    left = MAX_ENTRIES
    while waiting and left > 0:
        module = waiting.pop()
        left -= 1
        if isinstance(module, Inert) and id(module) not in seen:
            seen.add(id(module))
            yield module
            children = text_items(module.attributes.get("_modules"))
            left -= len(children)
            waiting.extend(child for _, child in children)


def plain_value(value: Any) -> Any:
    """Convert a value to plain containers, numbers and text; what has no plain form becomes None.

    Tensors become lists. At most 16384 values (elements of tensors and arrays included) and a million
    characters are converted: containers that share content can describe more than fits into memory.
    """
    return _Plain().value(value, 0)


class _Plain:
    """Converts values until the limit is reached."""

    def __init__(self) -> None:
        self.left = MAX_PLAIN_VALUES

    def value(self, value: Any, depth: int) -> Any:
        """Return the plain form, or None."""
        if depth > MAX_PLAIN_DEPTH or not self._takes(1):
            return None
        if isinstance(value, Inert) and value.kind == "argparse.Namespace":
            value = value.attributes
        if isinstance(value, dict):
            return dict(self._pairs(value, depth + 1))
        if isinstance(value, list | tuple | set | frozenset):
            return list(self._items(value, depth + 1))
        if isinstance(value, str):
            return value if self._takes(len(value) // _TEXT_UNIT) else None
        if isinstance(value, bool | int | float):
            return value
        return self._numbers(value)

    def _takes(self, count: int) -> bool:
        """Reserve `count` more values; return False if that exceeds the limit."""
        if count > self.left:
            return False
        self.left -= count
        return True

    def _items(self, values: Iterable[Any], depth: int) -> Iterator[Any]:
        for value in values:
            if not self.left:
                return
            yield self.value(value, depth)

    def _pairs(self, values: Mapping[Any, Any], depth: int) -> Iterator[tuple[str | int, Any]]:
        for key, value in values.items():
            if not self.left:
                return
            # A skipped key counts too, since it takes time.
            cost = 1 + len(key) // _TEXT_UNIT if isinstance(key, str) else 1
            if self._takes(cost) and isinstance(key, str | int):
                yield key, self.value(value, depth)

    def _numbers(self, value: Any) -> Any:
        if isinstance(value, Tensor) and self._takes(value.numel()):
            return value.tolist() if value.numel() else []
        if isinstance(value, NumpyArray) and isinstance(value.content, bytes):
            try:
                return value.value() if self._takes(len(value.content)) else None
            except ValueError:  # an object array, or truncated
                return None
        return None


def _no_zip(path: Path, error: zipfile.BadZipFile) -> tuple[str, Path, str]:
    """Return the UserError arguments (what, where, fix) for a file that is not an intact zip."""
    with open(path, "rb") as stream:
        start = stream.read(16)
    again = "fetch or copy the file again"
    if not start:
        return "the file is empty", path, again
    if start.startswith(b"PK"):
        return f"the file is damaged or cut off ({error})", path, again
    if start[:1] == b"\x80":
        what = "it is in torch's format before 1.6 (a bare pickle), which may hold code"
        return what, path, "load and save it with a newer torch if you trust its source"
    if path.suffix.lower() in EXPORTED:
        return "it is an exported network", path, FROM_PT
    return "it is not a weight file", path, again


class _Records:
    """The records of a zip written by torch.save."""

    def __init__(self, archive: zipfile.ZipFile, file_bytes: int) -> None:
        self.archive = archive
        self.records = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in self.records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("the zip holds no data.pkl")
        self.root = pickles[0].removesuffix("data.pkl")
        if f"{self.root}constants.pkl" in self.records:
            raise RefusedError("it is a TorchScript export, which holds code")
        # torch.save doesn't compress. Compressed or overlapping records could unpack to any size.
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise RefusedError("its records are compressed")
        if sum(info.file_size for info in archive.infolist()) > file_bytes:
            raise RefusedError("its records are larger than the file")
        if self.records[pickles[0]].file_size > MAX_PICKLE_BYTES:
            raise RefusedError(f"its instructions are longer than {MAX_PICKLE_BYTES >> 20} MB")
        if f"{self.root}byteorder" in self.records and self._read("byteorder") != b"little":
            raise ValueError("it is in big-endian byte order")
        self.storages = Storages(lambda key: self._read(f"data/{key}"))

    def load(self) -> Any:
        """Return the object that the pickle describes."""
        return Machine(self.storages.get).run(self._read("data.pkl"))

    def _read(self, name: str) -> bytes:
        return self.archive.read(self.records[self.root + name])


class Storages:
    """The tensor storages of a file, each read once."""

    def __init__(self, read: Callable[[str], bytes]) -> None:
        """`read` returns the bytes of a key's record."""
        self._read = read
        self._known: dict[str, Tensor] = {}

    def get(self, wanted: Storage) -> Tensor:
        """Return a storage as a flat tensor. Raises ValueError if its size isn't the declared one."""
        if wanted.key not in self._known:
            content = self._read(wanted.key)
            if len(content) != wanted.count * wanted.dtype.itemsize:
                has = f"has {len(content)} bytes for {wanted.count} elements"
                raise ValueError(f"storage {shown(wanted.key)} {has}")
            flat = torch.frombuffer(bytearray(content or bytes(8)), dtype=wanted.dtype)
            self._known[wanted.key] = flat[: wanted.count]  # torch cannot wrap an empty buffer
        flat = self._known[wanted.key]
        if flat.dtype != wanted.dtype or flat.numel() != wanted.count:
            raise ValueError(f"storage {shown(wanted.key)} is asked for in two ways")
        return flat
