"""The best score of a run, and when to wait for a better one no longer."""

from __future__ import annotations

from dataclasses import dataclass

from utils.config.options import TrainOptions


@dataclass
class Best:
    """The best score so far and the epoch (0-based) it fell in."""

    fitness: float = -1.0
    epoch: int = 0

    def is_given_up(self, options: TrainOptions, done: int) -> bool:
        """Whether after so many epochs a better one is waited for no longer; never without scores."""
        waited = done - 1 - self.epoch
        return options.patience > 0 and not options.noval and waited >= options.patience


def why_over(options: TrainOptions, done: int, best: Best) -> str:
    """Why a run that goes on after `done` epochs has nothing left to train; empty where it has.

    It may have stopped early. Who then gives --epochs or --patience anew wants it to go on.
    """
    if done >= options.epochs:
        return f"all {options.epochs} epochs are done; --epochs {2 * options.epochs} adds as many"
    if done == 0 or options.given & {"epochs", "patience"} or not best.is_given_up(options, done):
        return ""
    return (
        f"it stopped early after epoch {done}: no better score since epoch {best.epoch + 1}; "
        f"--patience {2 * options.patience} goes on"
    )
