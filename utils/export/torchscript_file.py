"""Export to .torchscript files."""

from __future__ import annotations

import io
import json
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.yolo import Model
from utils.export.network import ExportNetwork
from utils.export.scripted_nms import select_detections
from utils.inference.facts import ExportFacts, facts_to_dict
from utils.inference.torchscript_backend import CONFIG


def torchscript_content(model: Model, facts: ExportFacts) -> bytes:
    """Return the content of a .torchscript file, with the facts as JSON in its `config.txt`.

    model: fused, in eval mode, on the device to trace on.
    """
    weights = model.head.m[0].weight
    assert isinstance(weights, Tensor)
    batch, height, width = facts.shape
    multiple = model.size_multiple
    images = torch.zeros(batch or 2, model.channels, height or 4 * multiple, width or 3 * multiple).to(
        weights
    )
    stream = io.BytesIO()
    with warnings.catch_warnings():
        # PyTorch recommends torch.export, but programs that load TorchScript cannot read its files.
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
        network = ExportNetwork(model, _scripted(facts)).eval()
        traced: Any = torch.jit.trace(network, images, check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, stream, _extra_files={CONFIG: json.dumps(facts_to_dict(facts))})
    return stream.getvalue()


def _scripted(facts: ExportFacts) -> Any:
    nms = facts.nms
    if nms is None:
        return None
    scripted = torch.jit.script(select_detections)
    return partial(
        scripted,
        conf_thres=nms.conf_thres,
        iou_thres=nms.iou_thres,
        max_det=nms.max_det,
        agnostic=nms.agnostic,
    )
