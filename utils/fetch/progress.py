"""Bars for what is fetched and unpacked."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_LOG_SECONDS = 30.0  # between two lines of a bar that nobody watches


class TransferBar(tqdm):  # type: ignore[misc] # tqdm has no types
    """A bar of bytes, or of files; where nobody watches, a line every half minute and none before."""

    # tqdm's watching thread would make every fork of a loader's workers a fork of several threads.
    monitor_interval = 0

    def __init__(self, total: int | None, title: str, initial: int = 0, unit: str = "B") -> None:
        """`total` is None where nobody knows it; `initial` was there before."""
        self._watched = sys.stderr.isatty()
        self._said = time.monotonic()
        super().__init__(
            total=total,
            initial=initial,
            desc=title,
            unit=unit,
            unit_scale=unit == "B",
            unit_divisor=1024,
            file=sys.stderr if self._watched else _Silence(),
            dynamic_ncols=self._watched,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draws the bar, or says a line when it is time."""
        if self._watched:
            return bool(super().display(msg, pos))
        if time.monotonic() - self._said > _LOG_SECONDS:
            self._said = time.monotonic()
            print(self, file=sys.stderr, flush=True)
        return True


class _Silence:
    """Takes the control characters that tqdm draws with."""

    def write(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass
