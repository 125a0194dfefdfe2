"""How far two networks are apart on an image, and which images are shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.yolo import Model
from utils.batch import Batch, Letterbox
from utils.evaluation import disagreement
from utils.evaluation.disagreement import (
    DisagreementPlots,
    as_shown,
    compare_detections,
    objectness_map,
)

BOX = [10.0, 10.0, 20.0, 20.0]
HALF = [10.0, 10.0, 20.0, 15.0]  # IoU .5 with BOX
FAR = [40.0, 40.0, 50.0, 50.0]


def test_a_box_of_several_classes_is_shown_with_the_best() -> None:
    shown = as_shown(found((BOX, 0.6, 1), (FAR, 0.5, 0), (BOX, 0.9, 0), (FAR, 0.1, 2)))
    assert torch.equal(shown, found((BOX, 0.9, 0), (FAR, 0.5, 0)))
    assert as_shown(found()).shape == (0, 6)


def found(*rows: tuple[list[float], float, int]) -> Tensor:
    return torch.tensor([[*box, confidence, label] for box, confidence, label in rows]).reshape(-1, 6)


@pytest.mark.parametrize(
    ("first", "second", "amount", "alone"),
    [
        ([(BOX, 0.8, 0)], [(BOX, 0.8, 0)], 0.0, ([False], [False])),
        ([(BOX, 0.8, 0)], [(BOX, 0.3, 0)], 0.5, ([False], [False])),
        ([(BOX, 0.8, 0)], [(HALF, 0.8, 0)], 0.4, ([False], [False])),
        ([(BOX, 0.8, 0)], [(BOX, 0.8, 1)], 1.6, ([True], [True])),
        ([(BOX, 0.8, 0)], [(FAR, 0.5, 0)], 1.3, ([True], [True])),
        # The other hardly sees it: that is less apart than not at all, and still nothing to be shown.
        ([(BOX, 0.8, 0)], [(BOX, 0.1, 0)], 0.7, ([True], [False])),
        ([(BOX, 0.8, 0)], [], 0.8, ([True], [])),
        # What neither would show does not count.
        ([(BOX, 0.2, 0)], [(FAR, 0.2, 0)], 0.0, ([False], [False])),
        # The partner is the one that overlaps most, whichever comes first.
        ([(BOX, 0.8, 0)], [(HALF, 0.9, 0), (BOX, 0.8, 0)], 0.9, ([False], [True, False])),
    ],
)
def test_the_amount_is_that_of_the_definition_worked_out_by_hand(
    first: list[Any], second: list[Any], amount: float, alone: tuple[list[bool], list[bool]]
) -> None:
    difference = compare_detections(found(*first), found(*second))
    assert difference.amount == pytest.approx(amount, abs=1e-6)
    assert tuple(flags.tolist() for flags in difference.alone) == alone
    swapped = compare_detections(found(*second), found(*first))
    assert swapped.amount == pytest.approx(amount, abs=1e-6)


def test_doubles_and_doubtful_detections_of_an_evaluation_are_left_out() -> None:
    kept = as_shown(found((BOX, 0.8, 0), (HALF, 0.7, 0), ([10.0, 10.0, 20.0, 15.5], 0.6, 1), (FAR, 0.04, 0)))
    assert kept[:, 4].tolist() == pytest.approx([0.8, 0.6])
    assert len(as_shown(torch.zeros(0, 6))) == 0


def test_objectness_lies_where_the_cells_are_also_where_they_reach_beyond_the_picture() -> None:
    coarse = torch.full((1, 1, 1, 1, 6), -20.0)
    fine = torch.full((1, 2, 4, 8, 6), -20.0)
    fine[0, 1, 1, 2, 4] = 20.0
    network = SimpleNamespace(
        stride=torch.tensor([8.0, 64.0]),
        forward_features=lambda images: (),
        forward_head=lambda _: (fine, coarse),
    )
    seen = objectness_map(cast(Any, network), torch.zeros(1, 3, 32, 64))[0]
    assert seen.shape == (32, 64)
    # The centre of that cell is at y 12, x 20; from there it falls to nothing over one cell.
    assert float(seen[8:16, 16:24].max()) > 0.8 and seen.argmax() // 64 in (11, 12)
    assert float(seen[:, 32:].max()) < 1e-3 and float(seen[24:].max()) < 1e-3


class Fixed(nn.Module):
    """A network that says of each image what its mean brightness picks from a list."""

    def __init__(self, answers: Sequence[Tensor]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.answers, self.calls = answers, 0
        self.stride = torch.tensor([32.0])

    def forward_features(self, images: Tensor) -> tuple[Tensor, ...]:
        assert not self.training
        self.calls += len(images)
        return (images,)

    def forward_head(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        places = (features[0].mean(dim=(1, 2, 3)) * 10).round().long().tolist()
        rows = [torch.cat((self.answers[place], torch.zeros(4, 7)))[:4] for place in places]
        return (torch.stack(rows).reshape(len(rows), 1, 2, 2, 7),)

    def decode_levels(self, levels: Sequence[Tensor]) -> Tensor:
        return levels[0].reshape(len(levels[0]), 4, 7)

    def decode_above(self, levels: Sequence[Tensor], least: float) -> tuple[Tensor, Tensor, Tensor]:
        decoded = self.decode_levels(levels)
        image, row = (decoded[..., 4] > least).nonzero(as_tuple=True)
        return image, row, decoded[image, row]


def prediction(confidence: float) -> Tensor:
    return torch.tensor([[32.0, 32.0, 20.0, 20.0, confidence, 1.0, 0.0]])


def batch_of(count: int) -> Batch:
    """Images of growing brightness, padded above and below, the first with a label, the last unlabelled."""
    pixels = torch.stack([torch.full((3, 64, 64), number / 10) for number in range(count)])
    labelled = torch.ones(count, dtype=torch.bool)
    labelled[-1] = False
    return Batch(
        pixels,
        torch.tensor([[0.0, 0.0, 0.5, 0.5, 0.3, 0.3]]),
        labelled,
        tuple(f"{number}.png" for number in range(count)),
        (Letterbox((96, 128), (0.5, 0.5), (8.0, 0.0)),) * count,
    )


def test_the_pictures_with_the_largest_amounts_are_kept_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disagreement, "SCENES", 3)
    other = Fixed([prediction(confidence) for confidence in (0.5, 0.9, 0.0, 0.3, 0.8, 0.0)]).train()
    own = [found(([22.0 * 2, 14.0 * 2, 42.0 * 2, 34.0 * 2], 0.5, 0))] * 6
    pictures = DisagreementPlots(
        cast(Model, Fixed([prediction(0.5)] * 6)), cast(Model, other), ("student", "teacher"), ["a", "b"]
    )
    batch = batch_of(6)
    pictures(batch, own)
    # Apart by 0, .4, .5, .2, .3 and .5.
    kept = sorted(((amount, seen.path) for amount, _, seen in pictures._worst), reverse=True)
    assert [(round(amount, 3), path) for amount, path in kept] == [
        (0.5, "5.png"),
        (0.5, "2.png"),
        (0.4, "1.png"),
    ]
    assert other.training
    assert pictures.save(tmp_path, "2") == [tmp_path / "disagreement2.jpg", tmp_path / "objectness2.jpg"]
    for name in ("disagreement2.jpg", "objectness2.jpg"):
        image = cv2.imread(str(tmp_path / name))
        assert image is not None and np.ptp(image) > 100


def test_no_more_images_are_looked_at_than_is_allowed_and_agreement_draws_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disagreement, "MOST_IMAGES", 4)
    other = Fixed([prediction(0.0)] * 6)
    pictures = DisagreementPlots(cast(Model, other), cast(Model, other), ("a", "b"), ["a", "b"])
    for _ in range(3):
        pictures(batch_of(3), [torch.zeros(0, 6)] * 3)
    assert other.calls == 6
    assert pictures.save(tmp_path) == [] and list(tmp_path.iterdir()) == []


def test_only_classes_that_both_know_are_compared() -> None:
    """What the evaluated network finds of another class the other cannot name."""
    nothing = Fixed([prediction(0.0)] * 2)
    own = [found(([44.0, 28.0, 84.0, 68.0], 0.9, 1)), found(([44.0, 28.0, 84.0, 68.0], 0.6, 0))]
    kept = {}
    for classes in (None, (0,)):
        nothing.calls = 0
        pictures = DisagreementPlots(
            cast(Model, nothing), cast(Model, nothing), ("a", "b"), ["a", "b"], classes=classes
        )
        pictures(batch_of(2), own)
        kept[classes] = sorted(round(amount, 3) for amount, *_ in pictures._worst)
    assert kept == {None: [0.6, 0.9], (0,): [0.6]}
