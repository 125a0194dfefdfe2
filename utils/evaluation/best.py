"""The best score of a run, and when a better one is waited for no longer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Best:
    """The best score so far and the epoch (0-based) it fell in."""

    fitness: float = -1.0
    epoch: int = 0

    def after(self, epoch: int, fitness: float) -> Best:
        """The best one when `epoch` has been scored, too.

        The later of equal ones, so that epochs in which nothing is found yet use up no patience.
        """
        return Best(fitness, epoch) if fitness >= self.fitness else self

    def is_given_up(self, patience: int, noval: bool, done: int) -> bool:
        """Whether after so many epochs a better one is waited for no longer.

        patience: epochs to wait, 0 for ever. noval: whether no epoch is scored, and none is waited for.
        """
        return patience > 0 and not noval and done - 1 - self.epoch >= patience
