"""Losses between what the Detect layers of student and teacher see.

Shapes: B images, C channels, H W grid, K classes; one map (B, C, H, W) a level. They need no common
classes, anchors or family.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.losses.detection import mean_count

FeatureKind = Literal["cwd", "pkd", "score-l2"]
# At these the gradient of a feature loss is about half as strong as that of the labels' loss on a student
# that has begun to learn; as they are, some are a hundred times as strong and would be all that counts.
GAINS = {"cwd": 0.02, "pkd": 0.1, "score-l2": 0.3}


class FeatureLoss(nn.Module):
    """Pulls the student's maps, projected to the teacher's channels, towards the teacher's.

    The projections train with the student and are saved with the run, never with its weights.

    Source: `cwd`, Shu et al., Channel-wise Knowledge Distillation for Dense Prediction (arXiv 2011.13256),
    eq. 4; `pkd`, Cao et al., PKD (arXiv 2207.02039), eq. 3; `score-l2` weighs squared errors by what the
    teacher's best class scores in a cell.
    """

    def __init__(self, kind: FeatureKind, own: Sequence[int], wanted: Sequence[int]) -> None:
        """`own` and `wanted`: channels of student and teacher, level by level."""
        super().__init__()
        self.kind = kind
        hidden = kind == "score-l2"
        self.projections = nn.ModuleList(_projection(a, b, hidden) for a, b in zip(own, wanted, strict=True))

    def forward(
        self, own: Sequence[Tensor], wanted: Sequence[Tensor], raw_levels: Sequence[Tensor]
    ) -> Tensor:
        """A float32 scalar, the sum over levels.

        own, wanted: maps of student and teacher. raw_levels: the teacher's raw outputs
        (B, A, H, W, 5 + K), which weigh the cells of `score-l2`.
        """
        total = torch.zeros((), device=own[0].device)
        for project, mine, theirs, raw in zip(self.projections, own, wanted, raw_levels, strict=True):
            projected, target = project(mine), theirs
            if target.shape[2:] != projected.shape[2:]:
                target = F.interpolate(target, projected.shape[2:], mode="bilinear", align_corners=False)
            # Softmax and variance in reduced precision lose what they are to measure.
            total = total + self.distance(projected.float(), target.float(), raw)
        return total * GAINS[self.kind]

    def distance(self, own: Tensor, target: Tensor, raw: Tensor) -> Tensor:
        """The loss of one level."""
        if self.kind == "cwd":
            return channelwise_divergence(standardised(own), standardised(target))
        if self.kind == "pkd":
            return F.mse_loss(standardised(own), standardised(target)) / 2
        scores = raw.float().sigmoid()
        weight = (scores[..., 4] * scores[..., 5:].amax(-1)).amax(1)[:, None]
        error = (own - target).square() * weight
        return error.sum() / (mean_count(weight.sum(), len(own)) * own.shape[1])


def standardised(x: Tensor) -> Tensor:
    """Every channel with mean 0 and variance 1 over the batch (a batch norm without parameters).

    As for every batch norm, the batch is that of this process.
    """
    return F.batch_norm(x, None, None, training=True)


def channelwise_divergence(own: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """KL between the spatial distributions of each channel, mean over channels and images."""
    student = F.log_softmax(own.flatten(2) / temperature, -1)
    teacher = F.log_softmax(target.flatten(2) / temperature, -1)
    divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return divergence * temperature**2 / (own.shape[0] * own.shape[1])


def _projection(own: int, wanted: int, hidden: bool) -> nn.Module:
    if hidden:
        return nn.Sequential(nn.Conv2d(own, wanted, 1), nn.SiLU(), nn.Conv2d(wanted, wanted, 1))
    return nn.Conv2d(own, wanted, 1)
