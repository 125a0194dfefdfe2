"""results.csv: one row per epoch, safe on disk even after a power failure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from utils.config.files import read_regular, refusals, write_text_atomically
from utils.errors import UserError

KEY = "epoch"
# A run of a thousand epochs writes 300 kB. A cell takes a hundred times its size in memory.
_MAX_BYTES, _MAX_CELLS = 16 << 20, 1 << 20
RESULTS_NAME, TIMES_NAME, REFERENCES_NAME = "results.csv", "times.csv", "references.json"
TIMES = (KEY, "train_seconds", "val_seconds")
# The scores on the validation split, under the names that YOLOv5 users know.
SCORES = ("metrics/precision", "metrics/recall", "metrics/mAP_0.5", "metrics/mAP_0.5:0.95")
_FIX = "move it away, a run begins another"
DIGITS = 8  # significant; enough to tell apart two runs that differ in the last bits of a float32


class ResultsWriter:
    """Appends one row per epoch to a CSV file whose columns are known up front.

    The whole file is rewritten each time to a temporary file and renamed: it is small, and complete at any
    time.

    An existing file is continued: its rows of earlier epochs are kept, rows from `start_epoch` on and a
    half-written last line are dropped. Columns of kept rows that the run no longer has come after the new
    ones.
    """

    def __init__(self, path: Path, columns: Sequence[str], start_epoch: int = 0) -> None:
        """`columns` contains `epoch`; `start_epoch` (0-based) is the first epoch to be appended."""
        assert KEY in columns and len(set(columns)) == len(columns), columns
        kept = [row for row in _read_rows(path)[1] if _is_before(row, start_epoch)] if path.exists() else []
        gone = {name: None for row in kept for name, cell in row.items() if cell and name not in columns}
        self.path, self.columns = path, (*columns, *gone)
        lines = [self.columns, *([row.get(name, "") for name in self.columns] for row in kept)]
        self._text = "".join(map(_line, lines))
        write_text_atomically(path, self._text)

    def append(self, row: Mapping[str, float | None]) -> None:
        """Append a row; columns that are missing or None stay blank.

        The row is on disk when this returns. Raises UserError if it cannot be written; the file is then
        unchanged.
        """
        assert KEY in row and set(row) <= set(self.columns), set(row) - set(self.columns)
        text = self._text + _line(_format(row.get(name)) for name in self.columns)
        write_text_atomically(self.path, text)
        self._text = text


def read_results(path: Path) -> dict[str, NDArray[np.float64]]:
    """Return the columns of a results.csv by name, one value per row; NaN if a cell holds no number.

    Ignores a half-written last line and blanks around the commas. Raises UserError if it is no such file.
    """
    header, rows = _read_rows(path)
    return {name: np.array([_number(row[name]) for row in rows], dtype=np.float64) for name in header}


def _read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns of a CSV file and its complete rows, their cells by column."""
    header, *rows = _cells(path) or [[]]
    return header, [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]


def _cells(path: Path) -> list[list[str]]:
    rows, count = [], 0
    try:
        for row in csv.reader(_whole_lines(path)):
            count += len(row)
            _check_count(count, path)
            rows.append([cell.strip() for cell in row])
    except csv.Error as error:
        raise UserError(f"is not a table of results ({error})", path, _FIX) from error
    return rows


def _whole_lines(path: Path) -> list[str]:
    """Return the complete lines, without what a killed run left behind them."""
    with refusals("cannot be read", path):
        text = read_regular(path, _MAX_BYTES).decode("utf-8", errors="replace")
    _check_count(text.count("\n"), path)
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _check_count(cells: int, path: Path) -> None:
    if cells > _MAX_CELLS:
        raise UserError(f"has more than {_MAX_CELLS:,} cells, too many for a table of results", path, _FIX)


def _is_before(row: Mapping[str, str], epoch: int) -> bool:
    return _number(row.get(KEY, "")) < epoch


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _format(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{float(value):.{DIGITS}g}"


def _line(cells: Iterable[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()
