"""Statistics of runs that differ only in their seed.

Scores are in 0..1 and shown in points, i.e. hundredths.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gain:
    """How much better runs are than others with the same seeds.

    points: the mean difference. error: its standard error, None for a single seed.
    """

    points: float
    error: float | None
    seeds: int

    def __str__(self) -> str:
        """Format as +5.0 ± 1.0."""
        return f"{self.points:+.1f}" + (f" ± {self.error:.1f}" if self.error is not None else "")


def gain_over(own: Mapping[int, float], other: Mapping[int, float]) -> Gain | None:
    """Return the gain of scores by seed over others, paired by seed; None if they share no seed."""
    seeds = sorted(own.keys() & other.keys())
    if not seeds:
        return None
    differences = [100 * (own[seed] - other[seed]) for seed in seeds]
    error = statistics.stdev(differences) / len(seeds) ** 0.5 if len(seeds) > 1 else None
    return Gain(statistics.mean(differences), error, len(seeds))


def gap_closed(own: Mapping[int, float], other: Mapping[int, float], goal: float) -> float | None:
    """Return the part of the gap between the other scores and a goal that the own scores close.

    Only seeds that both have count. None if there are none or the goal is not above the other scores.
    """
    gain = gain_over(own, other)
    if gain is None:
        return None
    gap = 100 * (goal - statistics.mean(other[seed] for seed in own.keys() & other.keys()))
    return gain.points / gap if gap > 0 else None


def part_to_reach(curve: Sequence[float], score: float) -> float:
    """Return the fraction of epochs after which a curve reaches a score, infinite if it does not."""
    places = np.flatnonzero(np.asarray(curve) >= score)
    return (int(places[0]) + 1) / len(curve) if len(places) else float("inf")


def spread_text(values: Sequence[float]) -> str:
    """Format the mean and standard deviation of scores, in points."""
    mean = 100 * statistics.mean(values)
    return f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"
