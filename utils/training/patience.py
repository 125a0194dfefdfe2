"""Why a run that stopped early has nothing left to train."""

from __future__ import annotations

from utils.config.options import TrainOptions
from utils.evaluation.best import Best


def stop_reason(options: TrainOptions, done: int, best: Best) -> str:
    """Why a run that goes on after `done` epochs has nothing left to train; empty where it has.

    It may have stopped early. Who then gives --epochs or --patience anew wants it to go on.
    """
    if done >= options.epochs:
        all_done = f"all {done} epochs are done" if done > 1 else "its only epoch is done"
        return f"{all_done}; --epochs {2 * done} adds as many"
    is_wanted = options.given & {"epochs", "patience"}
    if done == 0 or is_wanted or not best.is_given_up(options.patience, options.noval, done):
        return ""
    return (
        f"it stopped early after epoch {done}: no better score since epoch {best.epoch + 1}; "
        f"--patience {2 * options.patience} goes on"
    )
