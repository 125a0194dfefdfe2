"""Loggers: what they get, that they go on where they were, and that a broken one ends no run."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from utils.errors import UsageError
from utils.reporting.loggers import WANDB_ID, Loggers, check_loggers, open_loggers


class StandIn:
    """A module `wandb` that notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.config: dict[str, Any] = {}
        self.finished = 0

    def init(self, **given: Any) -> SimpleNamespace:
        self.calls.append(given)
        return SimpleNamespace(
            id=given["id"] or "abc123",
            config=SimpleNamespace(update=lambda values, allow_val_change: self.config.update(values)),
            log=lambda values, step: self.logged.append((values, step)),
            finish=lambda: setattr(self, "finished", self.finished + 1),
        )

    @staticmethod
    def Image(path: str) -> str:  # noqa: N802 - wandb's name
        return f"image {Path(path).name}"


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)  # type: ignore[arg-type]
    return stand_in


def draw(path: Path) -> None:
    cv2.imwrite(str(path), np.full((8, 8, 3), (255, 0, 0), np.uint8))


def test_a_run_logs_settings_finite_values_and_new_pictures_by_epoch(wandb: StandIn, tmp_path: Path) -> None:
    folder = tmp_path / "parts" / "exp"
    folder.mkdir(parents=True)
    draw(folder / "of_an_earlier_run.jpg")
    loggers = open_loggers(["wandb"], folder, pytest.fail, 0, resuming=False)
    loggers.settings({"epochs": 3, "hyp": {"lr0": 0.01}})
    draw(folder / "labels.jpg")
    loggers.epoch(0, {"train/box_loss": 0.5, "metrics/recall": None, "val/obj_loss": math.nan})
    loggers.epoch(1, {"train/box_loss": 0.4})
    draw(folder / "results.png")
    loggers.close()
    assert wandb.config == {"epochs": 3, "hyp": {"lr0": 0.01}}
    assert wandb.logged == [
        ({"train/box_loss": 0.5}, 0),
        ({"plots/labels": "image labels.jpg"}, 0),
        ({"train/box_loss": 0.4}, 1),
        ({"plots/results": "image results.png"}, 1),
    ]
    (call,) = wandb.calls
    assert (call["project"], call["name"], call["id"], call["resume"]) == ("parts", "exp", None, None)
    assert wandb.finished == 1


def test_a_run_that_goes_on_has_its_old_id_and_a_new_one_in_its_place_has_not(
    wandb: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    open_loggers(["wandb"], tmp_path, pytest.fail, 0, resuming=False)
    assert (tmp_path / WANDB_ID).read_text() == "abc123\n"
    open_loggers(["wandb"], tmp_path, pytest.fail, 4, resuming=True)
    open_loggers(["wandb"], tmp_path, pytest.fail, 0, resuming=False)
    assert [(call["id"], call["resume"]) for call in wandb.calls] == [
        (None, None),
        ("abc123", "allow"),
        (None, None),
    ]
    assert {call["project"] for call in wandb.calls} == {"mine"}
    open_loggers([], tmp_path, pytest.fail, 0, resuming=False)  # a later --resume must not find the old log
    assert not (tmp_path / WANDB_ID).exists()


def test_a_logger_that_fails_is_warned_of_once_and_the_others_go_on(tmp_path: Path) -> None:
    class Good:
        def __init__(self) -> None:
            self.epochs: list[int] = []

        def scalars(self, _values: object, epoch: int) -> None:
            self.epochs.append(epoch)

        def close(self) -> None:
            self.epochs.append(-1)

    class Broken(Good):
        def scalars(self, _values: object, epoch: int) -> None:
            if epoch == 1:
                raise RuntimeError("the service is down")
            super().scalars(_values, epoch)

    good, broken, said = Good(), Broken(), list[str]()
    loggers = Loggers(tmp_path, {"broken": lambda: broken, "good": lambda: good}, said.append)  # type: ignore[dict-item, return-value]
    for epoch in range(3):
        loggers.epoch(epoch, {"a": 1.0})
    loggers.close()
    assert (good.epochs, broken.epochs) == ([0, 1, 2, -1], [0])
    (line,) = said
    assert "--logger broken" in line and "the service is down" in line and "goes on" in line


def test_one_that_cannot_even_begin_is_left_out(wandb: StandIn, tmp_path: Path) -> None:
    def refuse(**_: object) -> None:
        raise RuntimeError("not logged in")

    wandb.init = refuse  # type: ignore[assignment, method-assign]
    said: list[str] = []
    loggers = open_loggers(["wandb"], tmp_path, said.append, 0, resuming=False)
    loggers.settings({})
    loggers.epoch(0, {"a": 1.0})
    loggers.close()
    assert len(said) == 1 and "not logged in" in said[0]


def test_what_is_not_installed_is_said_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="pip install wandb"):
        check_loggers(["wandb"])
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())  # type: ignore[arg-type] # a folder of that name
    with pytest.raises(UsageError, match="--logger wandb: is not installed"):
        check_loggers(["wandb"])


def test_tensorboard_reads_back_what_was_logged_and_repeated_epochs_count_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is missing: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    check_loggers(["tensorboard"])
    first = open_loggers(["tensorboard"], tmp_path, pytest.fail, 0, resuming=False)
    first.settings({"epochs": 3, "hyp": {"lr0": 0.01}})
    draw(tmp_path / "labels.jpg")
    for epoch, value in enumerate((0.1, 0.2, 0.9)):
        first.epoch(epoch, {"metrics/recall": value})
    first.close()
    # Killed before its state was written: the last epoch comes again.
    second = open_loggers(["tensorboard"], tmp_path, pytest.fail, 2, resuming=True)
    for epoch, value in ((2, 0.3), (3, 0.4)):
        second.epoch(epoch, {"metrics/recall": value})
    second.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    scalars = [(event.step, round(event.value, 4)) for event in events.Scalars("metrics/recall")]
    assert scalars == [(0, 0.1), (1, 0.2), (2, 0.3), (3, 0.4)]
    (image,) = events.Images("labels")
    assert (image.width, image.height, image.step) == (8, 8, 0)
    (text,) = events.Tensors("settings/text_summary")
    assert b"lr0: 0.01" in text.tensor_proto.string_val[0]
