"""NMS for TorchScript files.

torch.jit.script compiles this function from its source, so it is limited to TorchScript's subset of Python.
It does the same as `utils.boxes.suppress`, with the same operator: see there for the reasons.
"""

# No `from __future__ import annotations`: the compiler needs the types themselves.
import torch
from torch import Tensor


def select_detections(
    predictions: Tensor, conf_thres: float, iou_thres: float, max_det: int, agnostic: bool
) -> Tensor:
    """Select detections (B, max_det, 6) x1, y1, x2, y2, confidence, class from predictions (B, N, 5 + K).

    They are sorted by confidence and padded with rows of zeros.
    """
    out = torch.zeros([predictions.size(0), max_det, 6], device=predictions.device)
    for image in range(predictions.size(0)):
        rows = predictions[image]
        confidence, label = (rows[:, 5:] * rows[:, 4:5]).max(1)
        passing = confidence > conf_thres
        rows, confidence, label = rows[passing], confidence[passing], label[passing].float()
        half = rows[:, 2:4] / 2
        boxes = torch.cat((rows[:, :2] - half, rows[:, :2] + half), 1)
        if boxes.size(0) > 0:
            if agnostic:
                kept = torch.ops.torchvision.nms(boxes, confidence, iou_thres)
            elif boxes.size(0) <= 1000:  # as torchvision.ops.batched_nms: by offset boxes, else per class
                moved = boxes - boxes.min()
                moved = moved + (label * (moved.max() + 1.0)).unsqueeze(1)
                kept = torch.ops.torchvision.nms(moved, confidence, iou_thres)
            else:
                alive = torch.zeros_like(passing[: boxes.size(0)])
                for number in range(predictions.size(2) - 5):
                    own = (label == float(number)).nonzero().squeeze(1)
                    best = torch.ops.torchvision.nms(boxes[own], confidence[own], iou_thres)
                    alive[own[best]] = True
                kept = alive.nonzero().squeeze(1)
                kept = kept[confidence[kept].sort(descending=True)[1]]
            kept = kept[:max_det]
            found = torch.cat((boxes[kept], confidence[kept].unsqueeze(1), label[kept].unsqueeze(1)), 1)
            out[image, : kept.size(0)] = found
    return out
