"""Helpers of the benchmarks: medians of interleaved timings, and a description of the machine.

Times from different machines or days are hardly comparable. So whatever is to be compared is timed in the
same run, in alternating rounds, so that a temporary slowdown of the machine affects all of it.
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
    """Return a parser with those of the common options that this benchmark supports."""
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
    """Return the clock: with `--busy` that of CPU time.

    CPU time needs OMP_NUM_THREADS=1: it would include the busy waiting of threads for each other.
    """
    return time.process_time if given.busy else time.perf_counter


def device_of(name: str) -> torch.device:
    """Select the device and print it with the machine and torch's version."""
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
    """Return the median seconds of each piece of work, all of them timed in turn in each round.

    clock: for single-threaded work, `time.thread_time` excludes time that other processes take of its core.
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
    """Describe the load average of the machine."""
    if not hasattr(os, "getloadavg"):
        return "load unknown"
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows as a Markdown table."""
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def ms(seconds: float) -> str:
    """Format seconds as milliseconds."""
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{1000 * seconds:,.0f} ms"
