"""Which cells answer for which targets; shared by the ground-truth loss and by pseudo-boxes.

Shapes: L levels, M targets, A anchors of a level, P pairs of cell-and-anchor and target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.device import to_device

# Columns and rows from a target's own cell to its four neighbours: left, up, right, down.
_NEIGHBOURS = ((0, 0), (-1, 0), (0, -1), (1, 0), (0, 1))


@dataclass(frozen=True)
class Pairs:
    """The P pairs of all levels, one level after the other, each index a (P,) int64 tensor.

    image, anchor, row, column: the cell-and-anchor of a pair, in the grid of its `level`; place: the same
        as a position among all the cells of its image, level after level.
    target: the row of its target; label: its class.
    boxes: (P, 4) float32, the target's centre relative to the cell's upper left corner, then its
        width and height, all in grid units of the level.
    counts: how many pairs each level has.
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
        """The pairs on a device, in two copies that nothing waits for."""
        if self.boxes.device == device:
            return self
        return Pairs.of(to_device(self.indices(), device), to_device(self.boxes, device), self.counts)

    def indices(self) -> Tensor:
        """All indices as one tensor (8, P), in the order of the fields."""
        cells = (self.image, self.anchor, self.row, self.column, self.level, self.place)
        return torch.stack((*cells, self.target, self.label))

    @classmethod
    def of(cls, indices: Tensor, boxes: Tensor, counts: tuple[int, ...]) -> Pairs:
        """From what `indices` gives, the boxes and the counts."""
        image, anchor, row, column, level, place, target, label = indices
        return cls(image, anchor, row, column, level, place, target, label, boxes, counts)

    def padded(self, least: int = 256) -> tuple[Pairs, Tensor]:
        """The same with as many pairs at every level, a power of two and not below `least`.

        Also gives which of them are real, (P,) float32, 1 or 0; the others lie at the first cell.
        """
        width = max(least, 1 << max(max(self.counts) - 1, 0).bit_length())
        offsets = torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))
        places = torch.arange(len(self)) + offsets * width
        starts = torch.tensor(self.counts).cumsum(0) - torch.tensor(self.counts)
        places = places - starts[offsets]
        total = width * len(self.counts)
        indices, boxes, real = (
            torch.zeros(8, total, dtype=torch.int64),
            torch.ones(total, 4),
            torch.zeros(total),
        )
        indices[:, places], boxes[places], real[places] = self.indices(), self.boxes, 1.0
        return Pairs.of(indices, boxes, (width,) * len(self.counts)), real

    def __len__(self) -> int:
        """The number of pairs P."""
        return len(self.target)

    def pick(self, levels: Sequence[Tensor]) -> Tensor:
        """The rows (P, D) that the levels (B, A, H_l, W_l, D) hold for the pairs."""
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
    """Pairs the cells of all levels with targets.

    A target matches an anchor when neither side differs by `ratio_limit` times or more. It goes to
    the cell that holds its centre and to the nearer of the left and right and of the upper and lower
    neighbours, where these exist.

    targets: (M, 6) image, class, centre x, centre y, width, height, normalised to the image.
    anchors_grid: (L, A, 2) widths and heights in grid units of each level. grids_hw: L rows and columns.
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
    # A neighbour counts when the centre lies in the half of the cell that touches it.
    side = centres - own - 0.5
    near = ((steps * side[:, None]).sum(3) > 0) | (steps == 0).all(2)
    inside = ((cells >= 0) & (cells < sides[:, None])).all(3)
    level, step, target, anchor = (fits[:, None] & (near & inside)[..., None]).nonzero(as_tuple=True)

    cell = cells[level, step, target]
    column, row = cell.unbind(1)
    per_anchor = torch.tensor([rows * columns for rows, columns in grids_hw], device=device)
    before = anchors_grid.shape[1] * (per_anchor.cumsum(0) - per_anchor)  # cells of the levels before
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
