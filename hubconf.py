"""Networks from Python: `from hubconf import load`, or through torch.hub.

    model = torch.hub.load("path/of/this/folder", "custom", path="best.pt", source="local")
    model = torch.hub.load("path/of/this/folder", "yolov5s", source="local")

See docs/python.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from models.yolo import Model
from utils.errors import UserError
from utils.inference.arguments import Device
from utils.inference.hub import HubModel, bare, load, load_or_create, ready
from utils.inference.results import Detections

__all__ = ["Detections", "HubModel", "custom", "load"]
dependencies = ["torch", "torchvision", "numpy", "cv2", "yaml", "tqdm", "matplotlib"]


def custom(
    path: str | Path | Sequence[str | Path] = (),
    autoshape: bool = True,
    _verbose: bool = True,
    device: Device = None,
    path_or_model: str | Path | None = None,
) -> HubModel | Model:
    """Load a weight file for inference, or with `autoshape=False` the bare torch module of a .pt file.

    Several .pt files form an ensemble, for inference only.

    `device` and `_verbose` are as in `load`. `path_or_model` is an older name of `path`.
    """
    if path_or_model is not None:
        path = path_or_model
    if not isinstance(path, str | Path | Sequence):
        raise UserError(f"is a {type(path).__name__}", "path", "give the path of a weight file")
    if autoshape:
        return load(path, device, _verbose)
    if not isinstance(path, str | Path):
        raise UserError("an ensemble is for inference only", "path", "leave autoshape on, or name one file")
    return bare(path, device)


def _sized(name: str) -> object:
    """Return the torch.hub entry point for a network size."""

    def entry(
        pretrained: bool = True,
        channels: int = 3,
        classes: int = 80,
        autoshape: bool = True,
        _verbose: bool = True,
        device: Device = None,
    ) -> HubModel | Model:
        model = load_or_create(name, pretrained, channels, classes, device)
        return ready(model, device, name, _verbose) if autoshape else model

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"{name}, with its public weights where `pretrained`; bare where not `autoshape`."
    return entry


yolov5n, yolov5s, yolov5m, yolov5l, yolov5x = (_sized(f"yolov5{size}") for size in "nsmlx")
yolov5n6, yolov5s6, yolov5m6, yolov5l6, yolov5x6 = (_sized(f"yolov5{size}6") for size in "nsmlx")
