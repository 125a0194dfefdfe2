"""Console output of a run: lines, tables and progress bars.

Messages and tables go to standard output, bars and warnings to standard error, so that `> log.txt`
keeps what is worth keeping. Ranks above 0 print nothing.
"""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, TextIO

from tqdm import tqdm

from utils.bars import BAR, LINE, ProgressBar, write_line
from utils.config.printable import printable
from utils.distributed import rank

CELL_WIDTH = 8  # minimum width of a column of values; a longer heading widens it
GAP = 2  # between columns
SHORT_LINE = "{desc} {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}{run_left}{postfix}]"
# Maximum terminal columns of SHORT_LINE (without the two counts), and of the rate and the bar itself beside
# it. An epoch's columns get the rest.
SHORT_WIDTH, RATE_WIDTH, BAR_WIDTH = 44, 12, 19


class EpochBar(ProgressBar):
    """The bar of an epoch: a header with the column names, then their values and the bar.

    On a narrow terminal progress and times take precedence: the bar itself, the rate and the last columns are
    left out if there is no room for them.
    """

    def __init__(
        self,
        iterable: Iterable[Any] | None,
        total: int | None,
        place: str,
        columns: Sequence[str],
        quiet: bool = False,
        initial: int = 0,
        to_come: int = 0,
    ) -> None:
        """`place` is shown in the first column, e.g. 3/100; `to_come` is the item count of later epochs."""
        self._to_come = to_come
        self._place = f"{place:>9}"
        self._columns, self._unseen = tuple(columns), frozenset[str]()
        layout = BAR
        if sys.stderr.isatty():
            layout = self._fit(_terminal_width(), 2 * len(str(total)))
        self._values: dict[str, float | int | str] = {}
        if not quiet:
            headings = (f"{heading(name):>{_width_of(name)}}" for name in self._columns)
            _write((" " * GAP).join((f"{'Epoch':>9}", *headings)), sys.stderr)
        super().__init__(iterable, total, self._line(), quiet, initial, layout=layout)

    def _fit(self, width: int, counts: int) -> str:
        """Drop the last columns that do not fit the terminal; return the layout of the bar that does."""
        room = width - len(self._place) - SHORT_WIDTH - counts
        ends = list(accumulate(GAP + _width_of(name) for name in self._columns))
        shown = sum(end <= room for end in ends)
        self._columns, self._unseen = self._columns[:shown], frozenset(self._columns[shown:])
        room -= ends[shown - 1] if shown else 0
        return BAR if room >= RATE_WIDTH + BAR_WIDTH else LINE if room >= RATE_WIDTH else SHORT_LINE

    @property
    def format_dict(self) -> dict[str, Any]:
        """The fields of the line, with the time left for the whole run."""
        known = super().format_dict
        done = 0 if self.disable else known["n"] - known["initial"]
        if not self._to_come or not done:
            return known
        left = (known["total"] - known["n"] + self._to_come) * known["elapsed"] / done
        return {**known, "run_left": f", run {duration(left)}"}

    def set_postfix(
        self, ordered_dict: Mapping[str, Any] | None = None, refresh: bool = True, **kwargs: Any
    ) -> None:
        """Show values in their columns, and those without a column after the bar.

        A value stays until it is replaced. In a log `refresh` is ignored: only the interval decides.
        """
        self._values.update(ordered_dict or {}, **kwargs)
        self.set_description_str(self._line(), refresh=False)
        placed = self._unseen.union(self._columns)
        others = {name: _cell(value) for name, value in self._values.items() if name not in placed}
        super().set_postfix(others, refresh=refresh and not self._in_log)

    def _line(self) -> str:
        cells = (f"{_cell(self._values.get(name, '-')):>{_width_of(name)}}" for name in self._columns)
        return (" " * GAP).join((self._place, *cells))


def _terminal_width() -> int:
    """Return the width of the terminal that shows the bars, as standard output may go to a file."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


def heading(name: str) -> str:
    """Return the column heading of a value: its name, with the loss it belongs to as a letter."""
    return name.replace("distill_grad_ratio", "d_grad").replace("distill_", "d_")


def _width_of(name: str) -> int:
    return max(CELL_WIDTH, len(heading(name)))


class Console:
    """The only way to print to the user's terminal."""

    def __init__(self, quiet: bool = False) -> None:
        """`quiet` silences everything but warnings; ranks above 0 are always silent."""
        self._quiet = quiet

    @property
    def quiet(self) -> bool:
        """Whether messages, tables and bars are left out."""
        return self._quiet or rank() > 0

    def info(self, message: str) -> None:
        """Print one or several lines to standard output."""
        if not self.quiet:
            _write(message, sys.stdout)

    def warn(self, message: str) -> None:
        """Print to standard error that something is wrong but the run continues."""
        if rank() == 0:
            warning(message)

    def table(self, rows: Iterable[Sequence[object]], header: Sequence[str]) -> None:
        """Print a table to standard output, see `format_table`."""
        self.info(format_table(rows, header))

    def progress(
        self, iterable: Iterable[Any] | None, total: int | None, description: str, unit: str = "it"
    ) -> ProgressBar:
        """Return a bar to iterate over (or to `update`, without an iterable)."""
        return ProgressBar(iterable, total, description, self.quiet, unit=unit)

    def epoch(
        self,
        iterable: Iterable[Any] | None,
        total: int | None,
        place: str,
        columns: Sequence[str],
        initial: int = 0,
        to_come: int = 0,
    ) -> EpochBar:
        """Return a bar to iterate over that shows values in columns, set by `set_postfix`.

        place: which epoch of how many, e.g. 3/100. columns: names of the values, in order. initial: items
        that were done before; if all were, nothing is shown. to_come: items of later epochs, for the time
        left for the run.
        """
        quiet = self.quiet or (total is not None and initial >= total)
        return EpochBar(iterable, total, place, columns, quiet, initial, to_come)


def warning(message: str) -> None:
    """Print a warning to standard error, whatever this process's rank."""
    _write(f"warning: {message}", sys.stderr)


def duration(seconds: float) -> str:
    """Format a time with sensible precision: 45 s, 12 min, 3 h 20 min, 2 d 5 h."""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {rest} min"
    return f"{hours // 24} d {hours % 24} h"


def format_table(rows: Iterable[Sequence[object]], header: Sequence[str]) -> str:
    """Format rows in aligned columns: the first to the left, the others to the right.

    Floats get four significant digits; every row has as many cells as the header.
    """
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(_screen_width, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padding = [" " * (width - _screen_width(cell)) for cell, width in zip(row, widths, strict=True)]
        first = row[0] + padding[0]
        lines.append("  ".join((first, *map("".join, zip(padding[1:], row[1:], strict=True)))).rstrip())
    return "\n".join((lines[0], "  ".join("-" * width for width in widths), *lines[1:]))


def _cell(value: object) -> str:
    """Return a value as text; floats short enough for a column."""
    if not isinstance(value, float):
        return printable(str(value))  # a line break would break the table
    text = f"{value:.4g}"
    return text if len(text) <= CELL_WIDTH else f"{value:.2e}"


def _screen_width(text: str) -> int:
    """Return the terminal columns a text takes: two for wide (East Asian) characters, none for accents."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) > 0 for letter in text)


def _write(text: str, stream: TextIO) -> None:
    """Write above the bars, if there are any on the terminal."""
    if sys.stderr.isatty():
        with tqdm.external_write_mode(file=stream):
            write_line(text, stream)
    else:
        write_line(text, stream)
