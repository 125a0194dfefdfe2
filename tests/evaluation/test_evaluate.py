"""The evaluation loop with a toy network that finds exactly what it is told to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.yolo import Model
from utils.batch import Batch, Letterbox, StudentOutput
from utils.boxes import cxcywh_to_xyxy
from utils.evaluation import evaluate as module
from utils.evaluation.evaluate import EvaluationSettings, evaluate
from utils.evaluation.plots import targets_from_detections

SIDE = 64
LETTERBOX = Letterbox(original_hw=(96, 128), scale=(0.5, 0.5), pad=(8.0, 0.0))


class Oracle(nn.Module):
    """A network whose image carries, in its first pixels, the predictions that come out."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.nc = classes
        self.scale = nn.Parameter(torch.ones(1))
        self.norm = nn.BatchNorm2d(3).eval()

    def forward_features(self, images: Tensor) -> tuple[Tensor, ...]:
        assert not self.training and not torch.is_grad_enabled()
        return (images,)

    def forward_head(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        width = 5 + self.nc
        return (features[0].flatten(1)[:, : width * 8].reshape(len(features[0]), 8, width) * self.scale,)

    def decode_levels(self, levels: Sequence[Tensor]) -> Tensor:
        return levels[0]

    def decode_above(self, levels: Sequence[Tensor], least: float) -> tuple[Tensor, Tensor, Tensor]:
        decoded = self.decode_levels(levels)
        image, row = (decoded[..., 4] > least).nonzero(as_tuple=True)
        return image, row, decoded[image, row]

    def forward_augmented(self, images: Tensor) -> Tensor:
        return self.decode_levels(self.forward_head(self.forward_features(images))).flip(1)


def _batch(
    targets: list[tuple[int, int, list[float]]], images: int, classes: int, score: float = 0.9
) -> Batch:
    """Targets (image, class, normalised box); the image tells the oracle to find all of them."""
    pixels = torch.zeros(images, 8, 5 + classes)
    used = [0] * images
    for image, label, box in targets:
        row = pixels[image, used[image]]
        row[:4], row[4], row[5 + label] = torch.tensor(box) * SIDE, score, 1.0
        used[image] += 1
    canvas = torch.zeros(images, 3 * SIDE * SIDE)
    canvas[:, : pixels[0].numel()] = pixels.flatten(1)
    rows = [[float(image), float(label), *box] for image, label, box in targets]
    return Batch(
        images=canvas.view(images, 3, SIDE, SIDE),
        targets=torch.tensor(rows).reshape(-1, 6),
        labelled=torch.ones(images, dtype=torch.bool),
        paths=tuple(f"{n}.jpg" for n in range(images)),
        letterboxes=(LETTERBOX,) * images,
    )


TARGETS = [(0, 0, [0.3, 0.4, 0.2, 0.2]), (0, 1, [0.7, 0.6, 0.3, 0.2]), (1, 1, [0.5, 0.5, 0.6, 0.5])]


def _evaluate(batches: list[Batch], classes: int = 3, **options: Any) -> Any:
    options.setdefault("names", [f"class {n}" for n in range(classes)])
    return evaluate(cast(Model, Oracle(classes)), cast(Any, batches), **options)


def test_a_network_that_finds_everything_scores_nearly_one() -> None:
    result = _evaluate([_batch(TARGETS, images=3, classes=3)] * 2)
    assert result.map50_95 > 0.98 and result.precision > 0.98 and result.recall > 0.98
    assert (result.images, result.labels) == (6, 6)
    assert result.images_with_class.tolist() == [2, 4, 0]
    assert result.fitness == pytest.approx(0.1 * result.map50 + 0.9 * result.map50_95)
    assert np.diag(result.confusion.matrix).tolist() == [2, 4, 0, 0] and result.confusion.matrix.sum() == 6
    assert set(result.speed_ms) == {"preprocess", "inference", "nms"}


def test_a_network_that_finds_nothing_scores_zero() -> None:
    batch = _batch(TARGETS, images=2, classes=3, score=0.0)
    result = _evaluate([batch])
    assert (result.precision, result.recall, result.map50, result.map50_95) == (0, 0, 0, 0)
    assert result.confusion.matrix[3].tolist() == [1, 2, 0, 0]


def test_observers_see_boxes_in_original_pixels() -> None:
    seen: list[tuple[Batch, list[Tensor]]] = []
    batch = _batch(TARGETS, images=2, classes=3)
    _evaluate([batch], observers=[lambda batch, detections: seen.append((batch, detections))])
    ((given, detections),) = seen
    assert [len(found) for found in detections] == [2, 1]
    in_batch = cxcywh_to_xyxy(torch.tensor(TARGETS[2][2]) * SIDE)
    expected = (in_batch - torch.tensor([0.0, 8, 0, 8])) / 0.5
    torch.testing.assert_close(detections[1][0, :4], expected)
    targets, confidences = targets_from_detections(given, detections)
    assert sorted(targets[:, :2].tolist()) == [[0, 0], [0, 1], [1, 1]]
    torch.testing.assert_close(targets[targets[:, 0] == 1, 2:], batch.targets[2:, 2:])
    assert confidences.tolist() == pytest.approx([0.9] * 3)


def test_losses_are_means_an_image() -> None:
    def loss(batch: Batch, output: StudentOutput) -> dict[str, Tensor]:
        assert output.levels[0].dtype == torch.float32 and len(output.features) == 1
        return {"box": torch.tensor(float(len(batch.images))), "cls": torch.tensor(2.0)}

    batches = [_batch(TARGETS, images=4, classes=3), _batch(TARGETS, images=2, classes=3)]
    assert _evaluate(batches, loss=loss).losses == {"box": (4 * 4 + 2 * 2) / 6, "cls": 2.0}


def _loss_of_images(batch: Batch, output: StudentOutput) -> dict[str, Tensor]:
    return {"box": torch.tensor(float(len(batch.images)))}


def test_a_result_over_processes_is_that_of_one_with_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two have three and two batches, and hits and false alarms of one confidence, whose order counts."""
    batches = [_batch(TARGETS, images, classes=3) for images in (2, 3, 2, 4, 2)]
    for number in (1, 3):  # what the network finds there is not labelled, but for one
        batches[number] = replace(batches[number], targets=batches[number].targets[2:])
    alone = _evaluate(batches, loss=_loss_of_images)
    shares, sent = (batches[0::2], batches[1::2]), ([], [])
    monkeypatch.setattr(module, "world_size", lambda: 2)
    for share, values in zip(shares, sent, strict=True):
        monkeypatch.setattr(module, "from_all", lambda value, to=values: to.append(value) or [value])
        _evaluate(share, loss=_loss_of_images)
    for share in shares:
        answers = iter(zip(*sent, strict=True))
        monkeypatch.setattr(module, "from_all", lambda _, answers=answers: list(next(answers)))
        result = _evaluate(share, loss=_loss_of_images)
        assert {**result.to_dict(), "speed_ms": {}} == {**alone.to_dict(), "speed_ms": {}}
        assert (result.images, result.labels) == (13, 11) and 0.1 < result.map50 < 0.9
        assert result.losses == alone.losses == {"box": (3 * 4 + 9 + 16) / 13}
        assert np.array_equal(result.images_with_class, alone.images_with_class)
        assert np.array_equal(result.confusion.matrix, alone.confusion.matrix)


def test_modes_of_all_modules_come_back() -> None:
    model = Oracle(3).train()
    model.norm.eval()
    evaluate(cast(Model, model), cast(Any, [_batch(TARGETS, 2, 3)]), names=["a", "b", "c"])
    assert model.training and not model.norm.training

    def broken(batch: Batch, detections: list[Tensor]) -> None:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        evaluate(
            cast(Model, model), cast(Any, [_batch(TARGETS, 2, 3)]), names=["a", "b", "c"], observers=[broken]
        )
    assert model.training and not model.norm.training


def test_images_that_nobody_labelled_are_not_scored() -> None:
    batch = _batch(TARGETS, images=2, classes=3)
    batch.labelled[0] = False
    result = _evaluate([batch])
    assert (result.images, result.labels) == (1, 1) and result.per_class.classes.tolist() == [1]


def test_with_a_single_class_every_detection_counts_as_it() -> None:
    batch = _batch(TARGETS, images=2, classes=3)
    batch.targets[:, 1] = 0
    result = _evaluate([batch], names=["object"], settings=EvaluationSettings(single_cls=True))
    assert result.map50_95 > 0.98 and result.per_class.classes.tolist() == [0]


def test_an_augmented_pass_is_scored_too() -> None:
    result = _evaluate([_batch(TARGETS, 2, 3)], settings=EvaluationSettings(augment=True))
    assert result.map50_95 > 0.98


def test_the_table_lists_classes_that_occur() -> None:
    result = _evaluate([_batch(TARGETS, images=3, classes=3)])
    rows, header = result.table()
    assert header == ["class", "images", "labels", "P", "R", "mAP50", "mAP50-95"]
    assert [row[:3] for row in rows] == [["all", "3", "3"], ["class 0", "1", "1"], ["class 1", "2", "2"]]
    assert result.table(verbose=False)[0] == rows[:1]
    assert result.ap_by_class()[:2].min() > 0.98 and result.ap_by_class()[2] == result.map50_95


def test_an_empty_set_scores_zero() -> None:
    result = _evaluate([])
    assert (result.images, result.labels, result.map50, result.losses) == (0, 0, 0.0, {})
