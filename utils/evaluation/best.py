"""The best score of a run, and early stopping."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Best:
    """The best score so far and its epoch (0-based)."""

    fitness: float = -1.0
    epoch: int = 0

    def after(self, epoch: int, fitness: float) -> Best:
        """Return the best score once `epoch` has been scored, too.

        The later one wins a tie, so that epochs in which nothing is detected yet use up no patience.
        """
        return Best(fitness, epoch) if fitness >= self.fitness else self

    def is_given_up(self, patience: int, noval: bool, done: int) -> bool:
        """Return whether to stop waiting for a better score after `done` epochs.

        patience: epochs to wait, 0 for no limit. noval: epochs are not scored, so there is nothing to wait
        for.
        """
        return patience > 0 and not noval and done - 1 - self.epoch >= patience
