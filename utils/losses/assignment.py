"""Assignment of targets to cells and anchors, for the ground-truth loss and for pseudo-boxes.

Shapes: L levels, M targets, A anchors per level, P pairs of a cell's anchor and a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.device import to_device

# Column and row offsets of a target's own cell and its four neighbours: left, up, right, down.
_NEIGHBOURS = ((0, 0), (-1, 0), (0, -1), (1, 0), (0, 1))


@dataclass(frozen=True)
class Pairs:
    """The P assigned pairs of all levels, ordered by level; each index is a (P,) int64 tensor.

    image, anchor, row, column: the pair's anchor and cell in the grid of its `level`; place: the same as a
        flat index into all predictions of the image.
    target: the row of its target; label: its class.
    boxes: (P, 4) float32, the target's centre relative to the cell's upper left corner, then its
        width and height, all in grid units of the level.
    counts: the number of pairs per level.
    """

    image: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor
    level: Tensor
    place: Tensor
    target: Tensor
    label: Tensor
    boxes: Tensor
    counts: tuple[int, ...]

    def to(self, device: torch.device) -> Pairs:
        """Move the pairs to a device, in two asynchronous copies."""
        if self.boxes.device == device:
            return self
        return Pairs.of(to_device(self.indices(), device), to_device(self.boxes, device), self.counts)

    def indices(self) -> Tensor:
        """Return all indices as one tensor (8, P), in field order."""
        cells = (self.image, self.anchor, self.row, self.column, self.level, self.place)
        return torch.stack((*cells, self.target, self.label))

    @classmethod
    def of(cls, indices: Tensor, boxes: Tensor, counts: tuple[int, ...]) -> Pairs:
        """Build pairs from the result of `indices`, the boxes and the counts."""
        image, anchor, row, column, level, place, target, label = indices
        return cls(image, anchor, row, column, level, place, target, label, boxes, counts)

    def padded(self, least: int = 256) -> tuple[Pairs, Tensor]:
        """Pad every level to the same number of pairs, a power of two or `least` if that is larger.

        Also return a mask (P,) float32: 1 for real pairs, 0 for padding, whose indices are all 0.
        """
        width = max(least, 1 << max(max(self.counts) - 1, 0).bit_length())
        offsets = torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))
        places = torch.arange(len(self)) + offsets * width
        starts = torch.tensor(self.counts).cumsum(0) - torch.tensor(self.counts)
        places = places - starts[offsets]
        total = width * len(self.counts)
        indices, boxes, mask = (
            torch.zeros(8, total, dtype=torch.int64),
            torch.ones(total, 4),
            torch.zeros(total),
        )
        indices[:, places], boxes[places], mask[places] = self.indices(), self.boxes, 1.0
        return Pairs.of(indices, boxes, (width,) * len(self.counts)), mask

    def __len__(self) -> int:
        """The number of pairs P."""
        return len(self.target)

    def pick(self, levels: Sequence[Tensor]) -> Tensor:
        """Gather the pairs' outputs (P, D) from levels (B, A, H_l, W_l, D)."""
        indices = [
            torch.split(index, list(self.counts))
            for index in (self.image, self.anchor, self.row, self.column)
        ]
        return torch.cat(
            [level[parts] for level, parts in zip(levels, zip(*indices, strict=True), strict=True)]
        )


def assign_targets(
    targets: Tensor, anchors_grid: Tensor, grids_hw: Sequence[tuple[int, int]], ratio_limit: float
) -> Pairs:
    """Assign targets to cells and anchors of all levels.

    A target matches an anchor if the ratio of widths and that of heights are both below `ratio_limit`,
    either way. It is assigned to the cell that holds its centre, and to the nearer of the left and right and
    of the upper and lower neighbours, where these exist.

    targets: (M, 6) image, class, centre x, centre y, width, height, normalised to the image.
    anchors_grid: (L, A, 2) in grid units of each level. grids_hw: (rows, columns) of the L levels.
    """
    device = targets.device
    sides = torch.tensor([(columns, rows) for rows, columns in grids_hw], device=device)[:, None]  # (L, 1, 2)
    boxes = targets[None, :, 2:6] * sides.repeat(1, 1, 2)  # (L, M, 4)
    centres = boxes[..., :2]
    ratio = boxes[:, :, None, 2:] / anchors_grid[:, None]
    fits = torch.maximum(ratio, 1 / ratio).amax(3) < ratio_limit  # (L, M, A)

    steps = torch.tensor(_NEIGHBOURS, device=device)[:, None]  # (5, 1, 2)
    own = centres.long()
    cells = own[:, None] + steps  # (L, 5, M, 2): column, row
    # A neighbour is used if the centre lies in the half of the cell next to it.
    side = centres - own - 0.5
    near = ((steps * side[:, None]).sum(3) > 0) | (steps == 0).all(2)
    inside = ((cells >= 0) & (cells < sides[:, None])).all(3)
    level, step, target, anchor = (fits[:, None] & (near & inside)[..., None]).nonzero(as_tuple=True)

    cell = cells[level, step, target]
    column, row = cell.unbind(1)
    per_anchor = torch.tensor([rows * columns for rows, columns in grids_hw], device=device)
    before = anchors_grid.shape[1] * (per_anchor.cumsum(0) - per_anchor)  # predictions of earlier levels
    return Pairs(
        image=targets[target, 0].long(),
        anchor=anchor,
        row=row,
        column=column,
        level=level,
        place=before[level] + anchor * per_anchor[level] + row * sides[level, 0, 0] + column,
        target=target,
        label=targets[target, 1].long(),
        boxes=torch.cat((centres[level, target] - cell, boxes[level, target, 2:]), 1),
        counts=tuple(torch.bincount(level, minlength=len(grids_hw)).tolist()),
    )
