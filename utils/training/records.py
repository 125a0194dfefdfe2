"""What a run writes down of each epoch: results.csv, times.csv, and the loggers that are asked for."""

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
    """Rows an epoch, of the first rank alone.

    Times have a file of their own: results.csv of two runs with the same seed is the same file, however
    often one of them was stopped, and what a clock says never is.
    """

    def __init__(self, folder: Path, step: TrainingStep, start_epoch: int, loggers: Loggers) -> None:
        """Goes on with the files that are there, see `ResultsWriter`."""
        self.results = ResultsWriter(folder / RESULTS_NAME, columns_of(step), start_epoch)
        self.times = ResultsWriter(folder / TIMES_NAME, TIMES, start_epoch)
        self.folder, self.loggers = folder, loggers

    def add(
        self, epoch: int, row: Mapping[str, float | None], train_seconds: float, val_seconds: float | None
    ) -> None:
        """Writes down an epoch (0-based); `val_seconds` None where it was not scored."""
        seconds = dict(zip(TIMES, (epoch, round(train_seconds, 3), val_seconds), strict=True))
        self.results.append(row)
        self.times.append(seconds)
        self.loggers.epoch(epoch, {name: v for name, v in {**row, **seconds}.items() if name != "epoch"})

    def references(self, scores: Mapping[str, tuple[float, float]], *, anew: bool) -> None:
        """Writes down mAP50 and mAP50-95 of other networks on the validation split, by their names.

        anew: the run begins; what an earlier one in this folder knew of its teachers goes.
        """
        if anew:
            (self.folder / REFERENCES_NAME).unlink(missing_ok=True)
        if scores:
            named = {
                name: dict(zip(("map50", "map50_95"), pair, strict=True)) for name, pair in scores.items()
            }
            write_text_atomically(self.folder / REFERENCES_NAME, json.dumps(named, indent=2) + "\n")
