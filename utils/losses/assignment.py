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
        total = width * len(self.counts)
        indices, boxes, mask = (
            torch.zeros(8, total, dtype=torch.int64),
            torch.ones(total, 4),
            torch.zeros(total),
        )
        own = zip(
            torch.split(self.indices(), list(self.counts), 1),
            torch.split(self.boxes, list(self.counts)),
            strict=True,
        )
        for first, (level_indices, level_boxes) in zip(range(0, total, width), own, strict=True):
            end = first + len(level_boxes)
            indices[:, first:end], boxes[first:end], mask[first:end] = level_indices, level_boxes, 1.0
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
    sides = torch.tensor([(columns, rows) for rows, columns in grids_hw], device=device)  # (L, 2)
    boxes = targets[None, :, 2:6] * sides.repeat(1, 2)[:, None]  # (L, M, 4)
    ratio = boxes[:, :, None, 2:] / anchors_grid[:, None]
    furthest = torch.maximum(ratio, 1 / ratio)
    fits = torch.maximum(furthest[..., 0], furthest[..., 1]) < ratio_limit  # (L, M, A)

    own = boxes[..., :2].long()
    cells = own[:, None] + torch.tensor(_NEIGHBOURS, device=device)[:, None]  # (L, 5, M, 2): column, row
    near = _near_cells(boxes[..., 0] - own[..., 0], boxes[..., 1] - own[..., 1])
    inside = (cells >= 0) & (cells < sides[:, None, None])
    used = near & inside[..., 0] & inside[..., 1]
    hits = (fits[:, None] & used[..., None]).flatten().nonzero()[:, 0]  # of (L, 5, M, A)

    count, anchors = len(targets), anchors_grid.shape[1]
    placed, anchor = hits // anchors, hits % anchors  # `placed`: of (L, 5, M)
    level = placed // max(count * len(_NEIGHBOURS), 1)
    target = placed % max(count, 1)
    # By rows of two dimensions: indexing with several tensors takes several times as long.
    cell = cells.reshape(-1, 2).index_select(0, placed)
    box = boxes.reshape(-1, 4).index_select(0, level * count + target)
    image, label = targets[:, :2].long().index_select(0, target).unbind(1)
    column, row = cell.unbind(1)
    per_anchor = torch.tensor([rows * columns for rows, columns in grids_hw], device=device)
    before = anchors * (per_anchor.cumsum(0) - per_anchor)  # predictions of earlier levels
    of_level = torch.stack((before, per_anchor, sides[:, 0]), 1).index_select(0, level)
    return Pairs(
        image=image,
        anchor=anchor,
        row=row,
        column=column,
        level=level,
        place=of_level[:, 0] + anchor * of_level[:, 1] + row * of_level[:, 2] + column,
        target=target,
        label=label,
        boxes=torch.cat((box[:, :2] - cell, box[:, 2:]), 1),
        counts=tuple(torch.bincount(level, minlength=len(grids_hw)).tolist()),
    )


def _near_cells(x: Tensor, y: Tensor) -> Tensor:
    """Return which of the `_NEIGHBOURS` are near a centre at (x, y) (L, M) in its cell: (L, 5, M) bool.

    A neighbour is near if the centre lies in the half of the cell next to it.
    """
    return torch.stack((torch.ones_like(x, dtype=torch.bool), x < 0.5, y < 0.5, x > 0.5, y > 0.5), 1)
