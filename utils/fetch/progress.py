"""Progress bars for downloading and unpacking."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_LOG_SECONDS = 30.0  # between two lines if standard error is not a terminal


class TransferBar(tqdm):  # type: ignore[misc] # tqdm has no types
    """A progress bar of bytes or files; if standard error is not a terminal, a line every half minute."""

    # tqdm's monitor thread would make every fork of loader workers a fork of a multi-threaded process.
    monitor_interval = 0

    def __init__(self, total: int | None, title: str, initial: int = 0, unit: str = "B") -> None:
        """`total` is None if unknown; `initial` is what an earlier attempt has done."""
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
        """Draw the bar, or print a line if one is due."""
        if self._watched:
            return bool(super().display(msg, pos))
        if time.monotonic() - self._said > _LOG_SECONDS:
            self._said = time.monotonic()
            print(self, file=sys.stderr, flush=True)
        return True


class _Silence:
    """Discards tqdm's output."""

    def write(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass
