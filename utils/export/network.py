"""The exported form of a network: images in, decoded boxes or detections out.

Shapes: B images, A anchors per cell, H W grid, N predictions per image, K classes, D rows of detections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from models.yolo import Model

Select = Callable[[Tensor], Tensor]


class ExportNetwork(nn.Module):
    """Decoded predictions (B, N, 5 + K) of images (B, 3, H, W), optionally passed through `select`.

    Everything that depends on the image size is computed from tensors, so that tracers capture it.
    """

    anchors_px: Tensor
    stride: Tensor

    def __init__(self, model: Model, select: Select | None = None) -> None:
        """`model` must be fused and in eval mode; `select` returns detections (B, D, 6)."""
        super().__init__()
        self.model = model
        self.select = select
        self.register_buffer("anchors_px", model.anchors_px.float())
        self.register_buffer("stride", model.stride.float())

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Return float32 for any precision of the network: float16 would round boxes visibly.

        A tuple of one, as programs that load TorchScript files of YOLOv5 expect.
        """
        levels = self.model.forward_head(self.model.forward_features(images))
        decoded = decode_for_export(levels, self.anchors_px, self.stride)
        return (decoded if self.select is None else self.select(decoded),)


def decode_for_export(levels: Sequence[Tensor], anchors_px: Tensor, strides: Tensor) -> Tensor:
    """Decode like `models.decode.decode`, but traceable: no shape as a Python number, no in-place operation.

    A cumulative sum numbers the cells, on the device of the levels.
    """
    parts = []
    for number, level in enumerate(levels):
        scores = level.float().sigmoid()
        one = torch.ones_like(scores[:1, :1, :, :, :1])
        # Minus 1 because the sum counts from 1, minus the half cell by which a centre may leave its cell.
        cells = torch.cat((one.cumsum(3), one.cumsum(2)), -1) - 1.5
        centres = (scores[..., :2] * 2 + cells) * strides[number]
        # The square as a product: ONNX's Pow cannot be converted to the oldest opsets.
        factors = scores[..., 2:4] * 2
        sizes = factors * factors * anchors_px[number].view(1, -1, 1, 1, 2)
        parts.append(torch.cat((centres, sizes, scores[..., 4:]), -1).flatten(1, 3))
    return torch.cat(parts, 1)
