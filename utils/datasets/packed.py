"""Compact sequences of per-image data, stored in a few arrays.

A list of a million strings or arrays is a million Python objects. Each has its overhead, and reference
counting writes to it, so that copy-on-write gives a forked process that only reads them copies of all.
Packed, they take only the memory of their content, which processes share.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]


class _Packed(Sequence[Any]):
    """Base of the packed sequences: length and bounds of the items in the packed array."""

    _ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self._ends)

    def _bounds(self, index: int) -> tuple[int, int]:
        count = len(self._ends)
        place = index + count if index < 0 else index
        if not 0 <= place < count:
            raise IndexError(index)
        return int(self._ends[place - 1]) if place else 0, int(self._ends[place])


class PackedTexts(_Packed):
    """Strings packed into one bytes object; undecodable file names keep their bytes.

    Equal to any sequence of the same strings.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        content, lengths = bytearray(), array("q")
        for text in texts:  # possibly a generator
            encoded = text.encode("utf-8", "surrogateescape")
            content += encoded
            lengths.append(len(encoded))
        self._ends = np.cumsum(np.frombuffer(lengths, np.int64), dtype=np.int64)
        self._bytes = bytes(content)

    @classmethod
    def of_parts(cls, content: NDArray[np.uint8], ends: NDArray[np.int64]) -> PackedTexts:
        """Rebuild from the arrays of `parts`; raises ValueError if they are inconsistent."""
        if len(content) != (ends[-1] if len(ends) else 0) or (np.diff(ends, prepend=0) < 0).any():
            raise ValueError("the parts do not belong together")
        packed = cls(())
        packed._bytes, packed._ends = content.tobytes(), ends
        return packed

    def parts(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return the bytes of all strings, and the end offset of each."""
        return np.frombuffer(self._bytes, np.uint8), self._ends

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """The string at an index; a list for a slice."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        start, end = self._bounds(index)
        return self._bytes[start:end].decode("utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class PackedRows(_Packed):
    """Arrays (n, 5) packed into one, with a row count for each."""

    def __init__(self, values: Rows, counts: NDArray[np.int64]) -> None:
        """`values` (T, 5) are the rows of all arrays, `counts` (N,) the number of rows of each."""
        self.values, self.counts, self._ends = values, counts, np.cumsum(counts, dtype=np.int64)
        assert int(counts.sum()) == len(values)

    @classmethod
    def of(cls, arrays: Iterable[Rows]) -> PackedRows:
        """Pack arrays (n, 5)."""
        growing = GrowingRows()
        for rows in arrays:
            growing.add(rows)
        return growing.packed()

    @overload
    def __getitem__(self, index: int) -> Rows: ...
    @overload
    def __getitem__(self, index: slice) -> list[Rows]: ...
    def __getitem__(self, index: int | slice) -> Rows | list[Rows]:
        """The array at an index, a view; a list for a slice."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        start, end = self._bounds(index)
        return self.values[start:end]


class GrowingRows:
    """Builds `PackedRows` from arrays (n, 5) added one by one."""

    def __init__(self) -> None:
        self._values, self._counts = array("f"), array("q")

    def add(self, rows: Rows) -> None:
        """Append the next array."""
        self._values.frombytes(rows.astype(np.float32, copy=False).tobytes())
        self._counts.append(len(rows))

    def packed(self) -> PackedRows:
        """Return the packed arrays; nothing can be added afterwards."""
        values = np.frombuffer(self._values, np.float32).reshape(-1, 5)
        return PackedRows(values, np.frombuffer(self._counts, np.int64))
