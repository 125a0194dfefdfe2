"""What nobody labelled teaches all the same: no distillation loss leaves it out."""

import pytest
import torch

from utils.batch import Batch, StudentOutput
from utils.distillation.presets import DenseOutputs, ObjectnessGated
from utils.distillation.pseudo_boxes import PseudoBoxes
from utils.distillation.response import Response
from utils.distillation.teacher import TeacherOutput
from utils.losses.detection import DetectionLoss, LossGains

STRIDES = torch.tensor([8.0, 16.0])
ANCHORS_GRID = torch.tensor([[[2.0, 2.0], [3.0, 5.0]], [[4.0, 4.0], [6.0, 3.0]]])
GAINS = LossGains()


PRESETS = {
    "response": Response(GAINS, ANCHORS_GRID),
    "boxes": PseudoBoxes(
        DetectionLoss(ANCHORS_GRID, 3, GAINS), STRIDES, confidence=0.25, overlap=0.45, soft=False,
        temperature=1.0,
    ),
    "objectness": ObjectnessGated(GAINS),
    "l2": DenseOutputs(GAINS, "l2", 1.0),
    "kl": DenseOutputs(GAINS, "kl", 4.0),
}  # fmt: skip


def levels_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(2, 2, side, side, 8, generator=generator) for side in (8, 4))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_compares_unlabelled_images_as_it_does_labelled_ones(name):
    results = []
    for labelled in ([True, True], [True, False], [False, False]):
        student = tuple(level.requires_grad_() for level in levels_of(0))
        batch = Batch(torch.zeros(2, 3, 64, 64), torch.zeros(0, 6), torch.tensor(labelled))
        terms = PRESETS[name](batch, StudentOutput((), student), TeacherOutput(levels_of(1)))
        sum(terms.values()).backward()
        results.append([*(value.detach() for value in terms.values()), *(level.grad for level in student)])
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))
    assert all(gradient[1].abs().sum() > 0 for gradient in results[0][-2:])
