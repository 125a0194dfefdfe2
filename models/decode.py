"""Decoding of raw network outputs to boxes and scores.

Shapes: B images, L levels, A anchors per cell, H W grid, K classes, N predictions (the sum of A * H * W
over the levels).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

Grid = tuple[Tensor, Tensor, Tensor]


def boxes_cxcywh_grid(raw_xywh: Tensor, anchors_grid: Tensor) -> Tensor:
    """Decode raw outputs (..., 4) to boxes (..., 4) in grid units, the centre relative to its cell's corner.

    The centre lies within -0.5..1.5, sizes within 0..4 times the anchor. `anchors_grid` (..., 2) is in grid
    units (sizes have the unit of the anchors).
    """
    # Each coordinate is contiguous in memory, so that later work on many boxes, such as IoU, vectorises.
    root = raw_xywh.movedim(-1, 0).contiguous().sigmoid()
    anchors = anchors_grid[(None,) * (raw_xywh.dim() - anchors_grid.dim())]
    sizes = (root[2:] * 2).square() * anchors.movedim(-1, 0)
    return torch.cat((root[:2] * 2 - 0.5, sizes)).movedim(0, -1)


def decode(levels: Sequence[Tensor], anchors_px: Tensor, strides: Tensor) -> Tensor:
    """Decode all levels to predictions (B, N, 5 + K) float32: centre x, y, width, height in px, scores.

    levels: raw (B, A, H, W, 5 + K); anchors_px: (L, A, 2); strides: (L,) in px. Predictions are ordered by
    level, then anchor, then row. Scores (objectness, classes) are sigmoids, 0..1.
    """
    batch, count, _, _, outputs = levels[0].shape
    shapes = tuple((level.shape[2], level.shape[3]) for level in levels)
    # Tensors created while tracing must not be cached: they may have no values.
    grid = _grid.__wrapped__ if torch.compiler.is_compiling() else _grid
    cells, level_of, anchor_of = grid(shapes, count, levels[0].device)
    strides_px = strides.float()[level_of].unsqueeze(1)
    anchors = anchors_px.float().reshape(-1, 2)[anchor_of]
    raw = torch.empty((batch, len(cells), outputs), device=levels[0].device)
    start = 0
    for level in levels:  # one copy, whatever the memory format: reshape and cat would make two
        end = start + count * level.shape[2] * level.shape[3]
        raw[:, start:end].view(level.shape).copy_(level)
        start = end
    # The backward pass of sigmoid needs its unmodified output.
    decoded = raw.sigmoid().clone() if raw.requires_grad else raw.sigmoid_()
    # In place: the scores, most of the tensor, need no further work.
    decoded[..., :2].mul_(2 * strides_px).add_(cells * strides_px)
    decoded[..., 2:4].mul_(2).square_().mul_(anchors)
    return decoded


def decode_above(
    levels: Sequence[Tensor], anchors_px: Tensor, strides: Tensor, least: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Decode only the predictions whose objectness is above `least` (0..1), usually a few dozen.

    Return image index (C,), row (C,) and prediction (C, 5 + K), sorted by image, then row; rows and
    predictions are those of `decode`.
    """
    limit = math.log(least / (1 - least)) if 0 < least < 1 else math.inf if least >= 1 else -math.inf
    images, rows, found, start = [], [], [], 0
    for level, anchors, stride in zip(levels, anchors_px.float(), strides.float(), strict=True):
        _, count, height, width, _ = level.shape
        image, anchor, y, x = (level[..., 4] > limit).nonzero(as_tuple=True)
        picked = level[image, anchor, y, x].float()
        boxes = boxes_cxcywh_grid(picked[:, :4], anchors[anchor])
        centres = (boxes[:, :2] + torch.stack((x, y), 1)) * stride
        images.append(image)
        rows.append(start + (anchor * height + y) * width + x)
        found.append(torch.cat((centres, boxes[:, 2:], picked[:, 4:].sigmoid()), 1))
        start += count * height * width
    together = torch.cat(images), torch.cat(rows), torch.cat(found)
    return sorted_by_image(*together) if len(levels[0]) > 1 else together


def decode_best(levels: Sequence[Tensor], anchors_px: Tensor, strides: Tensor, most: int) -> Tensor:
    """Decode each image's `most` predictions of the highest confidence, objectness times best class score.

    Return (B, n, 7) float32, best first: centre x, y, width, height in px, confidence, class, and the row
    among those of `decode`. n is `most` or N, if that is smaller. The class is that of the highest logit,
    even where several scores round to the same number. The shapes depend on no values, so that nothing has
    to be waited for on a GPU.
    """
    cells, level_of, anchor_of = _grid(
        tuple((level.shape[2], level.shape[3]) for level in levels), levels[0].shape[1], levels[0].device
    )
    classes, confidences, boxes = [], [], []
    for level in levels:
        best, label = level[..., 5:].max(-1)
        confidences.append((level[..., 4].float().sigmoid() * best.float().sigmoid()).flatten(1))
        classes.append(label.flatten(1))
        boxes.append(level[..., :4].flatten(1, 3))
    # NaN would come first.
    confidence, row = torch.cat(confidences, 1).nan_to_num(0.0).topk(min(most, len(cells)))
    raw = torch.cat(boxes, 1).gather(1, row[..., None].expand(-1, -1, 4)).float()
    strides_px = strides.float()[level_of][row][..., None]
    # In grid units, relative to the corner that `cells` gives without the half cell.
    found = boxes_cxcywh_grid(raw, anchors_px.float().reshape(-1, 2)[anchor_of][row])
    centres = (found[..., :2] + cells[row] + 0.5) * strides_px
    label = torch.cat(classes, 1).gather(1, row)
    # In one tensor, as every copy to main memory has to be waited for; float32 is exact up to 2^24.
    return torch.cat((centres, found[..., 2:], torch.stack((confidence, label, row), -1)), -1)


def sorted_by_image(image: Tensor, row: Tensor, predictions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort predictions (C, 5 + K) by their image index (C,), keeping their order within an image."""
    order = image.argsort(stable=True)
    return image[order], row[order], predictions[order]


@lru_cache(maxsize=64)
def _grid(shapes: tuple[tuple[int, int], ...], anchors: int, device: torch.device) -> Grid:
    """Return each prediction's cell corner, level and row among the anchors of all levels.

    The corner is (N, 2) float32 in cells, x first, minus the half cell by which a centre may lie outside.
    """
    # Cached tensors created in inference mode could not be used in autograd later.
    with torch.inference_mode(False), torch.no_grad():
        corners, levels, rows = [], [], []
        for level, (height, width) in enumerate(shapes):
            y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            corners.append(torch.stack((x, y), -1).reshape(-1, 2).repeat(anchors, 1))
            levels.append(torch.full((anchors * height * width,), level))
            rows.append((torch.arange(anchors) + level * anchors).repeat_interleave(height * width))
        grid = torch.cat(corners).float() - 0.5, torch.cat(levels), torch.cat(rows)
        return grid[0].to(device), grid[1].to(device), grid[2].to(device)
