"""A network in the form in which it is exported: pictures in, boxes or detections out, nothing else.

Shapes: B images, A anchors a cell, H W grid, N predictions an image, K classes, D rows of detections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from models.yolo import Model

Select = Callable[[Tensor], Tensor]


class ExportNetwork(nn.Module):
    """Decoded predictions (B, N, 5 + K) of images (B, 3, H, W), or what `select` makes of them.

    All that depends on the size of the images is computed from tensors, so that tracers follow it.
    """

    anchors_px: Tensor
    stride: Tensor

    def __init__(self, model: Model, select: Select | None = None) -> None:
        """`model`: fused, in evaluation mode; `select` gives detections (B, D, 6)."""
        super().__init__()
        self.model = model
        self.select = select
        self.register_buffer("anchors_px", model.anchors_px.float())
        self.register_buffer("stride", model.stride.float())

    def forward(self, images: Tensor) -> Tensor:
        """Float32, whatever the network computes in: a box is anchor times factor, and half of .001 shows."""
        levels = self.model.forward_head(self.model.forward_features(images))
        decoded = decode_for_export(levels, self.anchors_px, self.stride)
        return decoded if self.select is None else self.select(decoded)


def decode_for_export(levels: Sequence[Tensor], anchors_px: Tensor, strides: Tensor) -> Tensor:
    """As `models.decode.decode`, written for tracers: no shape becomes a number, no tensor is changed.

    The cells are counted by a cumulative sum, on whatever device the levels are.
    """
    parts = []
    for number, level in enumerate(levels):
        scores = level.float().sigmoid()
        one = torch.ones_like(scores[:1, :1, :, :, :1])
        # The corner less the half cell by which a centre may reach out; the sum counts from 1.
        cells = torch.cat((one.cumsum(3), one.cumsum(2)), -1) - 1.5
        centres = (scores[..., :2] * 2 + cells) * strides[number]
        sizes = (scores[..., 2:4] * 2).square() * anchors_px[number].view(1, -1, 1, 1, 2)
        parts.append(torch.cat((centres, sizes, scores[..., 4:]), -1).flatten(1, 3))
    return torch.cat(parts, 1)
