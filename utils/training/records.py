"""Per-epoch records of a run: results.csv, times.csv and the requested loggers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from utils.config.files import write_text_atomically
from utils.reporting.loggers import Loggers
from utils.reporting.results import REFERENCES_NAME, RESULTS_NAME, TIMES, TIMES_NAME, ResultsWriter
from utils.training.step import TrainingStep
from utils.training.table import columns_of


class RunRecords:
    """Per-epoch records of a run, written by rank 0 only.

    Times have a file of their own: in a single process results.csv is then identical for two runs with the
    same seed, however often one of them was stopped, which wall-clock times never are. (Several ranks add up
    their means in another order when one is stopped.)
    """

    def __init__(self, folder: Path, step: TrainingStep, start_epoch: int, loggers: Loggers) -> None:
        """Continue existing files, see `ResultsWriter`."""
        self.results = ResultsWriter(folder / RESULTS_NAME, columns_of(step), start_epoch)
        self.times = ResultsWriter(folder / TIMES_NAME, TIMES, start_epoch)
        self.folder, self.loggers = folder, loggers

    def add(
        self, epoch: int, row: Mapping[str, float | None], train_seconds: float, val_seconds: float | None
    ) -> None:
        """Write the row of an epoch (0-based); `val_seconds` is None if it was not validated."""
        seconds = dict(zip(TIMES, (epoch, round(train_seconds, 3), val_seconds), strict=True))
        self.results.append(row)
        self.times.append(seconds)
        self.loggers.epoch(epoch, {name: v for name, v in {**row, **seconds}.items() if name != "epoch"})

    def references(self, scores: Mapping[str, tuple[float, float]], *, anew: bool) -> None:
        """Write mAP50 and mAP50-95 of other networks on the validation split, by name.

        anew: the run is new; references that an earlier run left in this folder are deleted.
        """
        if anew:
            (self.folder / REFERENCES_NAME).unlink(missing_ok=True)
        if scores:
            named = {
                name: dict(zip(("map50", "map50_95"), pair, strict=True)) for name, pair in scores.items()
            }
            write_text_atomically(self.folder / REFERENCES_NAME, json.dumps(named, indent=2) + "\n")
