"""Why a resumed run has nothing left to train."""

from __future__ import annotations

from utils.config.options import TrainOptions
from utils.evaluation.best import Best


def stop_reason(options: TrainOptions, done: int, best: Best) -> str:
    """Return why a run resumed after `done` epochs has nothing left to train, an empty string if it has.

    It may have stopped early; giving --epochs or --patience again means that it should continue.
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
