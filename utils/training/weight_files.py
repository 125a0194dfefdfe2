"""The weight files of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.checkpoint import read_checkpoint, save_checkpoint
from models.yolo import Model
from utils.config.hyperparameters import Hyperparameters
from utils.config.options import TrainOptions, options_to_dict
from utils.evaluation.best import Best

_LAST, _BEST = "last.pt", "best.pt"


@dataclass(frozen=True)
class WeightFiles:
    """`last.pt`, `best.pt` and those of single epochs in a run's folder of weights; on rank 0 only."""

    folder: Path
    options: TrainOptions
    hyp: Hyperparameters

    def save(self, model: Model, epoch: int, best: Best, fitness: float | None) -> None:
        """Save the weights of an epoch (0-based), also as the best ones if no saved ones are better.

        best: of all epochs so far. fitness: this epoch's, None if it was not scored.
        """
        self._write(_LAST, model, epoch, best.fitness)
        if fitness is not None and (best.epoch == epoch or self._has_worse_best(fitness)):
            self._write(_BEST, model, epoch, fitness)
        period = self.options.save_period
        if period > 0 and epoch % period == 0:
            self._write(f"epoch{epoch}.pt", model, epoch, best.fitness)

    def save_if_none(self, model: Model, epoch: int, best: Best) -> None:
        """Save weights of which there are none: with --nosave, when fewer epochs are wanted than are done."""
        if not self.final.is_file():
            self._write(_LAST, model, epoch, best.fitness)

    @property
    def final(self) -> Path:
        """The file with the run's result: the best weights, or else the last."""
        best = self.folder / _BEST
        return best if best.is_file() else self.folder / _LAST

    def _has_worse_best(self, fitness: float) -> bool:
        """Return whether best.pt is not above this fitness, although an epoch that was not saved was."""
        path = self.folder / _BEST
        if not self.options.nosave or not path.is_file():
            return False
        saved = read_checkpoint(path).best_fitness
        return saved is not None and saved <= fitness

    def _write(self, name: str, model: Model, epoch: int, fitness: float) -> None:
        save_checkpoint(
            self.folder / name,
            model=model,
            epoch=epoch,
            best_fitness=fitness,
            meta={"options": options_to_dict(self.options), "hyp": self.hyp.to_dict()},
        )
