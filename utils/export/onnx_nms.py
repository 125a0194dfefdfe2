"""NMS for ONNX files, by the standard operator NonMaxSuppression.

PyTorch has no corresponding function. So a custom operator is declared here, and the exporter is given its
translation to ONNX.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from utils.boxes import cxcywh_to_xyxy
from utils.inference.facts import NmsInside

_NAME = "yolov5_distillation::kept_scores"


def select_with(nms: NmsInside) -> Callable[[Tensor], Tensor]:
    """Return a function from predictions (B, N, 5 + K) to detections (B, D, 6), which only exports.

    D is `max_det`; detections are sorted by confidence and padded with rows of zeros.
    """
    kept_scores = _operator()

    def select(predictions: Tensor) -> Tensor:
        confidence, label = (predictions[..., 5:] * predictions[..., 4:5]).max(-1)
        boxes = cxcywh_to_xyxy(predictions[..., :4])
        by_class = confidence.unsqueeze(1)
        if not nms.agnostic:
            numbers = torch.arange(predictions.shape[2] - 5, device=label.device).view(1, -1, 1)
            by_class = torch.where(label.unsqueeze(1) == numbers, by_class, torch.zeros_like(by_class))
        kept = kept_scores(boxes, by_class, nms.max_det, nms.iou_thres, nms.conf_thres)
        rows = torch.cat((boxes, kept.unsqueeze(-1), label.unsqueeze(-1).float()), -1)
        # A small image may have fewer than max_det predictions.
        rows = torch.nn.functional.pad(rows, (0, 0, 0, nms.max_det))
        best = rows[..., 4].topk(nms.max_det).indices
        rows = rows.gather(1, best.unsqueeze(-1).expand(-1, -1, 6))
        return rows * (rows[..., 4:5] > 0)

    return select


@lru_cache(maxsize=1)
def _operator() -> Any:
    """Declare the operator, once per process: scores (B, N) of the boxes that are kept, 0 for the others."""

    def meaning(boxes: Tensor, by_class: Tensor, most: int, iou: float, conf: float) -> Tensor:
        raise NotImplementedError("only its translation computes")

    def shape(boxes: Tensor, by_class: Tensor, most: int, iou: float, conf: float) -> Tensor:
        return by_class.amax(1)

    # torch reads the types of the arguments, which are strings in this module.
    for function in (meaning, shape):
        function.__annotations__ = {
            **{"boxes": Tensor, "by_class": Tensor, "most": int, "iou": float, "conf": float},
            "return": Tensor,
        }
    declared = torch.library.custom_op(_NAME, meaning, mutates_args=())
    declared.register_fake(shape)
    return declared


def translations() -> dict[Any, Any]:
    """Return the exporter's translation table for the operator; needs onnxscript."""
    import onnxscript

    op: Any = onnxscript.opset18

    def kept_scores(boxes: Any, by_class: Any, most: int, iou: float, conf: float) -> Any:
        found = op.NonMaxSuppression(
            boxes,
            by_class,
            op.Constant(value_ints=[most]),
            op.Constant(value_floats=[iou]),
            op.Constant(value_floats=[conf]),
        )
        scores = op.ReduceMax(by_class, op.Constant(value_ints=[1]), keepdims=0)
        places = op.Gather(found, op.Constant(value_ints=[0, 2]), axis=1)  # image and box, without the class
        return op.ScatterND(op.Sub(scores, scores), places, op.GatherND(scores, places))

    return {torch.ops.yolov5_distillation.kept_scores.default: kept_scores}
