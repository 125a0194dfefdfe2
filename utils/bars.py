"""The one style of progress bars, and of lines beside them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

from utils.config.printable import printable

_TIMES = "[{elapsed}<{remaining}{run_left}, {rate_fmt}{postfix}]"
BAR = "{desc} {percentage:3.0f}% |{bar:16}| {n_fmt}/{total_fmt} " + _TIMES
LINE = "{desc} {percentage:3.0f}% {n_fmt}/{total_fmt} " + _TIMES
ENDLESS = "{desc} {n_fmt} [{elapsed}, {rate_fmt}{postfix}]"
LOG_SECONDS = 30.0  # between two lines of a bar in a log


class ProgressBar(tqdm):  # type: ignore[misc] # tqdm has no types
    """A bar on a terminal; elsewhere an occasional line and one at the end.

    Behaves like tqdm's bars.
    """

    # tqdm's monitor thread would make every fork of a loader worker a fork of a multi-threaded process.
    monitor_interval = 0

    def __init__(
        self,
        iterable: Iterable[Any] | None,
        total: int | None,
        description: str,
        quiet: bool = False,
        initial: int = 0,
        unit: str = "it",
        layout: str = BAR,
    ) -> None:
        """`total` is the number of items, None if unknown; `initial` of them were done before.

        unit: what an item is, for the rate; bytes ("B") are scaled to K, M and G. layout: of the line on a
        terminal.
        """
        self._in_log = not sys.stderr.isatty()
        self._layout = LINE if self._in_log else layout
        super().__init__(
            iterable,
            desc=description,
            total=total,
            initial=initial,
            disable=quiet,
            file=_LogStream(sys.stderr) if self._in_log else sys.stderr,
            mininterval=LOG_SECONDS if self._in_log else 0.1,
            maxinterval=LOG_SECONDS,
            miniters=1,
            dynamic_ncols=not self._in_log,
            unit=unit,
            unit_scale=unit == "B",
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """The fields of the line, whose layout depends on whether the total is known by now."""
        known = super().format_dict
        return {**known, "run_left": "", "bar_format": self._layout if known["total"] else ENDLESS}

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar when tqdm asks for it; a log gets no line before the first item is done."""
        if self._in_log and self.n == 0:
            return True
        return bool(super().display(msg, pos))


class _LogStream:
    """A stream for tqdm that turns each redraw of a bar into a line, without control characters."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.strip("\r\n").rstrip()
        if line:
            write_line(line, self._stream)

    def flush(self) -> None:
        self._stream.flush()


def write_line(text: str, stream: TextIO) -> None:
    """Write and flush, so that both streams keep their order in one file.

    Control characters, e.g. in names from files, are escaped. So is what the stream's encoding lacks: a class
    name must not end a run.
    """
    text = printable(text, keep="\n\t")
    try:
        try:
            stream.write(f"{text}\n")
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            stream.write(f"{text.encode(encoding, 'backslashreplace').decode(encoding)}\n")
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError:
        pass  # a full disk under the log or a terminal that is gone costs the line, not the work
