"""A safe interpreter of pickle instructions, which never unpickles.

It walks the opcodes and builds plain containers, numbers, text and tensors itself. Every global that a
pickle names must be on the allow list in `inert`; nothing is imported or called.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable, Sized
from typing import Any

from torch import Tensor

from models.inert import (
    DTYPES,
    STORAGES,
    Inert,
    Name,
    NumpyArray,
    NumpyType,
    RefusedError,
    Storage,
    constructor,
    dict_of,
    in_twos,
    is_known,
    shown,
    text_items,
    usable_key,
)

# Total elements that calls may copy: an instruction of a few bytes can refer to a value of megabytes.
MAX_COPIED = 20_000_000
MAX_INSTRUCTIONS = 1_000_000  # the largest public files have a tenth; one can create a 200-byte set
MAX_NAME = 200  # characters of a global's module, and of its name in the module
MAX_BITS = 1000  # of an integer, so that converting it to float or text is bounded

_MARK = object()
_CONSTANTS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES "
    "BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 FLOAT BINFLOAT".split()
)
_FRESH: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}
_GATHERED: dict[str, Callable[[list[Any]], Any]] = {
    "LIST": list,
    "TUPLE": tuple,
    "FROZENSET": lambda items: frozenset(map(usable_key, items)),
    "DICT": lambda items: dict_of(in_twos(items)),
}


def _order(state: Any) -> str:
    """Return the byte order in the state of a NumPy dtype. Raises ValueError if there is none."""
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
    if not isinstance(order, str) or order not in ("<", ">", "=", "|"):
        raise ValueError("a numpy type has no proper byte order")
    return "<" if order == "|" else order


class Machine:
    """A pickle stack machine that works on inert values."""

    def __init__(
        self, storage: Callable[[Storage], Tensor], is_record: Callable[[str], bool] = lambda name: False
    ) -> None:
        """`storage` loads a storage; `is_record` accepts names of further classes to keep as records."""
        self.storage, self.is_record = storage, is_record
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0
        methods = [name for name in dir(self) if name.startswith("_on_")]
        self.steps = {name.removeprefix("_on_").upper(): getattr(self, name) for name in methods}

    def run(self, instructions: bytes) -> Any:
        """Execute the instructions and return the resulting value."""
        for number, (opcode, argument, _) in enumerate(pickletools.genops(instructions)):
            name = opcode.name
            if number == MAX_INSTRUCTIONS:
                raise RefusedError(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
            if name in _CONSTANTS:
                self._constant(argument)
            elif name in _FRESH:
                self.stack.append(_FRESH[name]())
            elif name in _GATHERED:
                self.stack.append(_GATHERED[name](self._to_mark()))
            elif name in self.steps:
                self.steps[name](argument)
            elif name not in ("PROTO", "FRAME", "STOP"):
                raise RefusedError(f"it uses the pickle instruction {name}")
        return self.stack.pop()

    def _constant(self, value: Any) -> None:
        # Hashing a number of megabytes is slow, and happens each time that it is a key.
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise RefusedError(f"a number has more than {MAX_BITS} bits")
        self.stack.append(value)

    def _to_mark(self) -> list[Any]:
        """Pop the last mark and everything above it; return the latter."""
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise ValueError("a mark is missing")
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def _take(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("the stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _named(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name is not text")
        if max(len(module), len(name)) > MAX_NAME:
            raise RefusedError(f"it asks for {shown(module)}.{shown(name)}, which is not part of a network")
        wanted = Name({"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module), name)
        if not (self.is_record(str(wanted)) or is_known(wanted)):
            raise RefusedError(f"it asks for {wanted}, which is not part of a network")
        self.stack.append(f"torch.{name}" if module == "torch" and name in DTYPES else wanted)

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Name) or not isinstance(arguments, list | tuple):
            raise RefusedError("it calls something that is not a global")
        self._count(arguments)
        if self.is_record(str(function)):
            self.stack.append(Inert(str(function), tuple(arguments)))
        else:
            self.stack.append(constructor(function)(*arguments))

    def _count(self, values: Iterable[Any]) -> None:
        # Tensors are passed as views and never copied; besides, a 0-d tensor has no length.
        copied = (value for value in values if isinstance(value, Sized) and not isinstance(value, Tensor))
        self.copied += sum(map(len, copied))
        if self.copied > MAX_COPIED:
            raise RefusedError("it copies its values over and over")

    def _on_global(self, argument: str) -> None:
        self._named(*argument.split(" ", 1))

    def _on_stack_global(self, _argument: Any) -> None:
        self._named(*self._take(2))

    def _on_reduce(self, _argument: Any) -> None:
        self._call(*self._take(2))

    _on_newobj = _on_reduce

    def _on_newobj_ex(self, _argument: Any) -> None:
        function, arguments, _keywords = self._take(3)
        self._call(function, arguments)

    def _on_inst(self, argument: str) -> None:
        arguments = self._to_mark()
        self._named(*argument.split(" ", 1))
        self._call(self.stack.pop(), arguments)

    def _on_obj(self, _argument: Any) -> None:
        function, *arguments = self._to_mark()
        self._call(function, arguments)

    def _on_build(self, _argument: Any) -> None:
        (state,) = self._take(1)
        target = self.stack[-1]
        if isinstance(target, Inert):
            parts = state if isinstance(state, tuple) else (state,)
            self._count(parts)
            target.attributes.update((key, value) for part in parts for key, value in text_items(part))
        elif isinstance(target, NumpyType):
            target.order = _order(state)
        elif isinstance(target, NumpyArray):
            if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[1], tuple):
                raise ValueError("a numpy array has no proper state")
            _, target.shape, target.dtype, _, target.content = state
        elif not isinstance(target, dict | Tensor):  # the state of these is unused metadata
            raise RefusedError(f"it sets attributes of {type(target).__name__}")

    def _on_binpersid(self, _argument: Any) -> None:
        (wanted,) = self._take(1)
        if not isinstance(wanted, tuple) or len(wanted) != 5 or wanted[0] != "storage":
            raise ValueError("a storage is named in an unknown way")
        _, kind, key, _, count = wanted
        if not isinstance(key, str) or type(count) is not int:
            raise ValueError("a storage is named in an unknown way")
        if not isinstance(kind, Name) or kind.module != "torch" or kind.name not in STORAGES:
            raise ValueError(f"storage {shown(key)} is of an unknown kind")
        self.stack.append(self.storage(Storage(STORAGES[kind.name], key, count)))

    def _on_append(self, _argument: Any) -> None:
        (item,) = self._take(1)
        self._list().append(item)

    def _on_appends(self, _argument: Any) -> None:
        items = self._to_mark()
        self._list().extend(items)

    def _on_additems(self, _argument: Any) -> None:
        items = self._to_mark()
        if not isinstance(self.stack[-1], set):
            raise ValueError("items are added to what is not a set")
        self.stack[-1].update(map(usable_key, items))

    def _on_setitem(self, _argument: Any) -> None:
        key, value = self._take(2)
        self._dict()[usable_key(key)] = value

    def _on_setitems(self, _argument: Any) -> None:
        items = self._to_mark()
        self._dict().update(dict_of(in_twos(items)))

    def _list(self) -> list[Any]:
        if not isinstance(self.stack[-1], list):
            raise ValueError("items are appended to what is not a list")
        return self.stack[-1]

    def _dict(self) -> dict[Any, Any]:
        if not isinstance(self.stack[-1], dict):
            raise ValueError("items are set in what is not a dict")
        return self.stack[-1]

    def _on_pop(self, _argument: Any) -> None:
        self._take(1)

    def _on_pop_mark(self, _argument: Any) -> None:
        self._to_mark()

    def _on_dup(self, _argument: Any) -> None:
        self.stack.append(self.stack[-1])

    def _on_tuple1(self, _argument: Any) -> None:
        self.stack.append(tuple(self._take(1)))

    def _on_tuple2(self, _argument: Any) -> None:
        self.stack.append(tuple(self._take(2)))

    def _on_tuple3(self, _argument: Any) -> None:
        self.stack.append(tuple(self._take(3)))

    def _on_get(self, argument: int) -> None:
        self.stack.append(self.memo[argument])

    _on_binget = _on_long_binget = _on_get

    def _on_put(self, argument: int) -> None:
        self.memo[argument] = self.stack[-1]

    _on_binput = _on_long_binput = _on_put

    def _on_memoize(self, _argument: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]
