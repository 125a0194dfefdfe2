"""What the benchmarks share: medians of things that are timed in turn, and the machine in words.

Times of different machines, or of one machine on different days, say little about one another. What is
to be compared is therefore timed in one run, round after round, so that whatever slows the machine down for
a while slows all of it down.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from utils.device import describe_device, select_device


def parser(
    description: str | None, rounds: int | None = None, *, device: bool = True, busy: bool = False
) -> argparse.ArgumentParser:
    """The options that benchmarks have in common: those of them that this one heeds."""
    made = argparse.ArgumentParser(description=description)
    if device:
        made.add_argument("--device", default="cpu", help="cpu, or the number of a GPU")
    if rounds is not None:
        made.add_argument("--rounds", type=int, default=rounds, help="timed rounds; the median counts")
    if busy:
        words = "count time on the processor: for a CPU that others use too"
        made.add_argument("--busy", action="store_true", help=words)
    return made


def clock_of(given: argparse.Namespace) -> Callable[[], float]:
    """What `--busy` asks for.

    With OMP_NUM_THREADS=1 that is: threads that wait for one another would count their waiting.
    """
    return time.process_time if given.busy else time.perf_counter


def device_of(name: str) -> torch.device:
    """The device, told on the console with the machine and torch's version."""
    device = select_device(name)
    print(f"{platform.machine()}, {describe_device(device)}, torch {torch.__version__}, {load()}")
    return device


def medians(
    work: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warm: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """The median seconds of each piece of work, all of them timed in turn in each round.

    clock: `time.thread_time` for work of a single thread leaves out what other processes take of its core.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(warm + rounds):
        for name, piece in work.items():
            begun = _now(device, clock)
            piece()
            if number >= warm:
                times[name].append(_now(device, clock) - begun)
    return {name: statistics.median(values) for name, values in times.items()}


def _now(device: torch.device, clock: Callable[[], float]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def load() -> str:
    """How busy the machine is beside this, in words."""
    if not hasattr(os, "getloadavg"):
        return "load unknown"
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints rows as Markdown."""
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def ms(seconds: float) -> str:
    """Seconds as milliseconds in words."""
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{1000 * seconds:,.0f} ms"
