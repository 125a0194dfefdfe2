"""Which weight files an epoch leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.checkpoint import read_checkpoint
from models.yolo import Model
from utils.config.hyperparameters import Hyperparameters
from utils.config.options import TrainOptions
from utils.evaluation.best import Best
from utils.training.weight_files import WeightFiles


@pytest.fixture(scope="module")
def model() -> Model:
    return Model("models/demo-student.yaml", nc=2)


def files(folder: Path, **options) -> WeightFiles:
    return WeightFiles(folder, TrainOptions(**options), Hyperparameters())


def trained(kept: WeightFiles, model: Model, scores: list[float | None], saved: set[int]) -> Best:
    """Go through epochs with these scores; weights are saved after those in `saved`."""
    best = Best()
    for epoch, score in enumerate(scores):
        best = best if score is None else best.after(epoch, score)
        if epoch in saved:
            kept.save(model, epoch, best, score)
    return best


def epochs_of(folder: Path) -> dict[str, int]:
    return {path.name: read_checkpoint(path).epoch for path in sorted(folder.iterdir())}


def test_best_is_that_of_the_best_epoch_and_the_later_of_equals(model, tmp_path):
    kept = files(tmp_path)
    trained(kept, model, [0.1, 0.3, 0.3, 0.2, None], saved=set(range(5)))
    assert epochs_of(tmp_path) == {"best.pt": 2, "last.pt": 4}
    assert kept.final.name == "best.pt" and read_checkpoint(kept.final).best_fitness == 0.3


def test_weights_that_are_better_than_the_saved_best_replace_it(model, tmp_path):
    """A run resumed with --nosave: its best epoch was not saved, and the last is better than the old best."""
    trained(files(tmp_path), model, [0.1, 0.2], saved={0, 1})
    kept = files(tmp_path, nosave=True)
    best = trained(kept, model, [0.1, 0.2, 0.9, 0.8], saved={3})
    assert best == Best(0.9, 2) and epochs_of(tmp_path) == {"best.pt": 3, "last.pt": 3}
    assert read_checkpoint(tmp_path / "best.pt").best_fitness == 0.8
    trained(kept, model, [0.1, 0.2, 0.9, 0.8, 0.7], saved={4})
    assert epochs_of(tmp_path) == {"best.pt": 3, "last.pt": 4}
    trained(kept, model, [0.1, 0.2, 0.9, 0.8, 0.7, 0.8], saved={5})
    assert epochs_of(tmp_path) == {"best.pt": 5, "last.pt": 5}


def test_a_last_epoch_that_is_not_the_best_is_not_called_so(model, tmp_path):
    kept = files(tmp_path, nosave=True)
    trained(kept, model, [0.3, 0.2], saved={1})
    assert epochs_of(tmp_path) == {"last.pt": 1} and kept.final.name == "last.pt"
    kept.save_if_none(model, 7, Best())
    assert epochs_of(tmp_path) == {"last.pt": 1}


def test_weights_of_single_epochs_are_kept(model, tmp_path):
    trained(files(tmp_path, save_period=2), model, [None] * 4, saved=set(range(4)))
    assert epochs_of(tmp_path) == {"epoch0.pt": 0, "epoch2.pt": 2, "last.pt": 3}
