"""Suppression that goes into ONNX files: the standard operator NonMaxSuppression.

PyTorch has no function of that shape. So one is declared here, with this meaning, and a translation of it is
handed to the exporter.
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
    """A function from predictions (B, N, 5 + K) to detections (B, D, 6), for the exporter alone to follow.

    D is `max_det`; best first, rows of zeros fill up.
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
        # A small picture may have fewer predictions than rows are wanted.
        rows = torch.nn.functional.pad(rows, (0, 0, 0, nms.max_det))
        best = rows[..., 4].topk(nms.max_det).indices
        rows = rows.gather(1, best.unsqueeze(-1).expand(-1, -1, 6))
        return rows * (rows[..., 4:5] > 0)

    return select


@lru_cache(maxsize=1)
def _operator() -> Any:
    """The function, declared once a process: scores (B, N) of the boxes that are kept, 0 for the others."""

    def meaning(boxes: Tensor, by_class: Tensor, most: int, iou: float, conf: float) -> Tensor:
        raise NotImplementedError("only its translation computes")

    def shape(boxes: Tensor, by_class: Tensor, most: int, iou: float, conf: float) -> Tensor:
        return by_class.amax(1)

    # torch reads the types of the arguments, which are texts here.
    for function in (meaning, shape):
        function.__annotations__ = {
            **{"boxes": Tensor, "by_class": Tensor, "most": int, "iou": float, "conf": float},
            "return": Tensor,
        }
    declared = torch.library.custom_op(_NAME, meaning, mutates_args=())
    declared.register_fake(shape)
    return declared


def translations() -> dict[Any, Any]:
    """What the exporter is to write for the function; needs onnxscript."""
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
