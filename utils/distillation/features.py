"""Losses between the inputs of the student's and the teacher's Detect layers.

Shapes: B images, C channels, H W grid, K classes; one map (B, C, H, W) per level. Student and teacher need no
common classes, anchors or architecture family.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.distributed import from_ranks, is_distributed
from utils.losses.detection import global_normaliser
from utils.losses.terms import differentiated_at_once

FeatureKind = Literal["cwd", "pkd", "score-l2"]
_EPS = 1e-5  # as in a batch norm
# Elements compared at once, on a CPU and on a GPU: the intermediates take ten times their memory.
CHUNKS = (1 << 18, 1 << 23)
# With these the gradient of a feature loss is about half as strong as that of the ground-truth loss on a
# student that has begun to learn; without them some are a hundred times as strong and would dominate.
GAINS = {"cwd": 0.02, "pkd": 0.1, "score-l2": 0.3}


class FeatureLoss(nn.Module):
    """Pulls the student's maps, projected to the teacher's channels, towards the teacher's.

    The projections are trained with the student and saved in the run's state, never in its weight files.

    Source: `cwd`, Shu et al., Channel-wise Knowledge Distillation for Dense Prediction (arXiv 2011.13256),
    eq. 4; `pkd`, Cao et al., PKD (arXiv 2207.02039), eq. 3; `score-l2` weights squared errors by the score of
    the teacher's best class in a cell.
    """

    def __init__(
        self, kind: FeatureKind, student_channels: Sequence[int], teacher_channels: Sequence[int]
    ) -> None:
        """`student_channels` and `teacher_channels`: of the maps at each level."""
        super().__init__()
        self.kind = kind
        hidden = kind == "score-l2"
        self.projections = nn.ModuleList(
            _projection(a, b, hidden) for a, b in zip(student_channels, teacher_channels, strict=True)
        )

    def forward(
        self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], raw_levels: Sequence[Tensor]
    ) -> Tensor:
        """Return the loss, a float32 scalar summed over levels.

        student_maps, teacher_maps: (B, C, H, W) per level, of one grid. raw_levels: the teacher's raw outputs
        (B, A, H, W, 5 + K), which weight the cells in `score-l2`.
        """
        total = torch.zeros((), device=student_maps[0].device)
        for project, student, teacher, raw in zip(
            self.projections, student_maps, teacher_maps, raw_levels, strict=True
        ):
            total = total + self.distance(project(student), teacher, raw)
        return total * GAINS[self.kind]

    def distance(self, student: Tensor, teacher: Tensor, raw: Tensor) -> Tensor:
        """Return the loss of one level, computed in chunks of channels, which are independent."""
        weight = self.weight(raw) if self.kind == "score-l2" else None
        if is_distributed():
            # Statistics span all ranks: gradients need the factors of all ranks' losses, not yet known here.
            return self.compare(student, teacher, weight) / student.shape[1]
        cells = student.shape[0] * student.shape[2] * student.shape[3]
        some = max(CHUNKS[student.device.type != "cpu"] // cells, 1)
        parts = [
            differentiated_at_once(partial(self.compare, teacher=teacher_part, weight=weight), student_part)
            for student_part, teacher_part in zip(
                torch.split(student, some, 1), torch.split(teacher, some, 1), strict=True
            )
        ]
        return torch.stack(parts).sum() / student.shape[1]

    def compare(self, student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
        """Return the distance of maps (B, C, H, W), summed over channels."""
        # Softmax and variance are too inaccurate in reduced precision.
        student, teacher = student.float(), teacher.float()
        if weight is not None:
            return ((student - teacher).square() * weight).sum()
        # Contiguous (not channels-last), since both losses reduce over the cells of each channel.
        student, teacher = standardised(student.contiguous(), teacher.contiguous())
        if self.kind == "cwd":
            return channelwise_divergence(student, teacher)
        return (student - teacher).square().mean((0, 2, 3)).sum() / 2

    def weight(self, raw: Tensor) -> Tensor:
        """Return the cell weights (B, 1, H, W) of `score-l2`: the teacher's scores divided by their sum."""
        scores = raw.float().sigmoid()
        best = (scores[..., 4] * scores[..., 5:].amax(-1)).amax(1)[:, None]
        return best / global_normaliser(best.sum(), len(best))


def standardised(*maps: Tensor) -> list[Tensor]:
    """Normalise each channel of maps (B, C, H, W) to mean 0 and variance 1 over the batch of all ranks.

    A batch norm without parameters. Unlike the network's norms it uses statistics of all ranks, because
    they are part of the loss, which must not depend on how the batch is split.
    """
    if not is_distributed():
        return [F.batch_norm(x, None, None, training=True) for x in maps]
    moments = [torch.stack(torch.var_mean(x, (0, 2, 3), correction=0)) for x in maps]
    counts = [x.new_full((2, 1), x.numel() // x.shape[1]) for x in maps]
    gathered = from_ranks(torch.cat((*moments, *counts), 1))
    widths = [*(x.shape[1] for x in maps), *(1 for _ in maps)]
    parts = torch.split(gathered, widths, 2)
    found = []
    for x, rank_moments, count in zip(maps, parts[: len(maps)], parts[len(maps) :], strict=True):
        (variances, means), part = rank_moments.unbind(1), count[:, 0] / count[:, 0].sum()
        mean = (means * part).sum(0)
        # Total variance: the mean of the variances within ranks plus the variance of their means.
        variance = ((variances + (means - mean).square()) * part).sum(0)
        wide = [value[:, None, None] for value in (mean, variance)]
        found.append((x - wide[0]) * (wide[1] + _EPS).rsqrt())
    return found


def channelwise_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the KL divergence of each channel's spatial softmax, mean over images, sum over channels."""
    log_student = F.log_softmax(student.flatten(2) / temperature, -1)
    log_teacher = F.log_softmax(teacher.flatten(2) / temperature, -1)
    divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return divergence * temperature**2 / student.shape[0]


def _projection(student_channels: int, teacher_channels: int, hidden: bool) -> nn.Module:
    if hidden:
        return nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 1),
            nn.SiLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1),
        )
    return nn.Conv2d(student_channels, teacher_channels, 1)
