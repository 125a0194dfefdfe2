"""Bars for what is fetched and unpacked."""

from __future__ import annotations

import sys

from tqdm import tqdm

_LOG_SECONDS = 30.0  # between two lines of a bar that nobody watches


class TransferBar(tqdm):  # type: ignore[misc] # tqdm has no types
    """A bar of bytes, or of files; where nobody watches, a line every half minute and none before."""

    # tqdm's watching thread would make every fork of a loader's workers a fork of several threads.
    monitor_interval = 0

    def __init__(self, total: int | None, title: str, initial: int = 0, unit: str = "B") -> None:
        """`total` is None where nobody knows it; `initial` was there before."""
        watched = sys.stderr.isatty()
        super().__init__(
            total=total,
            initial=initial,
            desc=title,
            unit=unit,
            unit_scale=unit == "B",
            unit_divisor=1024,
            mininterval=0.1 if watched else _LOG_SECONDS,
            delay=0 if watched else _LOG_SECONDS,
            dynamic_ncols=watched,
        )
