"""Which cells answer for which targets; shared by the ground-truth loss and by pseudo-boxes.

Shapes: M targets, A anchors of a level, P pairs of cell-and-anchor and target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.device import sent

# Columns and rows from a target's own cell to its four neighbours: left, up, right, down.
_NEIGHBOURS = ((0, 0), (-1, 0), (0, -1), (1, 0), (0, 1))


@dataclass(frozen=True)
class Matches:
    """The P pairs of one level, each index a (P,) int64 tensor.

    image, anchor, row, column: the cell-and-anchor of a pair; target: the row of its target, label its
        class.
    boxes: (P, 4) float32, the target's centre relative to the cell's upper left corner, then its
        width and height, all in grid units of the level.
    """

    image: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor
    target: Tensor
    label: Tensor
    boxes: Tensor

    def to(self, device: torch.device) -> Matches:
        """The pairs on a device, in two copies that nothing waits for."""
        if self.boxes.device == device:
            return self
        indices = (self.image, self.anchor, self.row, self.column, self.target, self.label)
        image, anchor, row, column, target, label = sent(torch.stack(indices), device)
        return Matches(image, anchor, row, column, target, label, sent(self.boxes, device))

    def __len__(self) -> int:
        """The number of pairs P."""
        return len(self.target)

    def pick(self, level: Tensor) -> Tensor:
        """The rows (P, D) that a level (B, A, H, W, D) holds for the pairs."""
        return level[self.image, self.anchor, self.row, self.column]

    def flat_index(self, shape: torch.Size) -> Tensor:
        """Positions (P,) in a flattened (B, A, H, W) tensor of the given shape."""
        _, anchors, rows, columns = shape[:4]
        return ((self.image * anchors + self.anchor) * rows + self.row) * columns + self.column


def assign_targets(
    targets: Tensor, anchors_grid: Tensor, grid_hw: tuple[int, int], ratio_limit: float
) -> Matches:
    """Pairs a level's cells with targets.

    A target matches an anchor when neither side differs by `ratio_limit` times or more. It goes to
    the cell that holds its centre and to the nearer of the left and right and of the upper and lower
    neighbours, where these exist.

    targets: (M, 6) image, class, centre x, centre y, width, height, normalised to the image.
    anchors_grid: (A, 2) widths and heights in grid units of the level.
    """
    rows, columns = grid_hw
    scale = targets.new_tensor([columns, rows, columns, rows])
    boxes = targets[:, 2:6] * scale
    centres = boxes[:, :2]
    ratio = boxes[:, None, 2:] / anchors_grid[None]
    fits = torch.maximum(ratio, 1 / ratio).amax(2) < ratio_limit  # (M, A)

    steps = torch.tensor(_NEIGHBOURS, device=targets.device)  # (5, 2)
    own = centres.long()
    cells = own[None] + steps[:, None]  # (5, M, 2): column, row
    # A neighbour counts when the centre lies in the half of the cell that touches it.
    side = centres - own - 0.5
    near = ((steps[:, None] * side[None]).sum(2) > 0) | (steps == 0).all(1)[:, None]
    inside = ((cells >= 0) & (cells < torch.tensor([columns, rows], device=cells.device))).all(2)
    step, target, anchor = (fits[None] & (near & inside)[:, :, None]).nonzero(as_tuple=True)

    cell = cells[step, target]
    return Matches(
        image=targets[target, 0].long(),
        anchor=anchor,
        row=cell[:, 1],
        column=cell[:, 0],
        target=target,
        label=targets[target, 1].long(),
        boxes=torch.cat((centres[target] - cell, boxes[target, 2:]), 1),
    )
