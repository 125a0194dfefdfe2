"""The options of export.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from utils.config.absent_options import ABSENT, ABSENT_FROM_EXPORT
from utils.config.options_base import (
    DATA,
    DETECTIONS,
    MACHINE,
    MODEL,
    RESULTS,
    Options,
    download_field,
    image_size,
)
from utils.config.options_inference import confidence, overlap
from utils.config.settings import at_least, between, option

ExportFormat = Literal["torchscript", "onnx", "openvino"]


# The oldest opset with an option's value: beyond it onnx cannot convert an operator.
_OLDEST_OPSETS = {"nms": (True, 18), "dynamic": (True, 15), "simplify": (False, 15)}


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """The options of export.py."""

    absent: ClassVar[Mapping[str, str]] = ABSENT | ABSENT_FROM_EXPORT
    weights: str = option("yolov5s.pt", "weights to export; the files are written beside them", group=MODEL)
    download: bool = download_field("public weights")
    data: str = option("", "without effect: a weight file knows its classes", group=DATA)
    include: tuple[ExportFormat, ...] = option(("torchscript",), "formats to write", group=RESULTS)
    imgsz: tuple[int, ...] = image_size((640,), "image size: one number, or height and width")
    batch_size: int = option(1, "images per batch", aliases=("batch",), limits=between(1, 4096), group=DATA)
    dynamic: bool = option(False, "accept batches and images of any size", group=DATA)
    source: str = option(
        "data/images",
        "images on which the files are compared with PyTorch: file, folder or pattern",
        group=DATA,
    )
    device: str = option("cpu", "device to export on: cpu, or the number of a GPU", group=MACHINE)
    half: bool = option(
        False, "weights in float16; OpenVINO takes images in float32 all the same", group=MODEL
    )
    opset: int = option(18, "ONNX opset version", limits=at_least(12), group=RESULTS)
    simplify: bool = option(
        True, "simplify the .onnx file: fold constants and drop what has no effect", group=RESULTS
    )
    nms: bool = option(False, "put NMS into the files", group=DETECTIONS)
    agnostic_nms: bool = option(False, "with --nms: class-agnostic", group=DETECTIONS)
    conf_thres: float = confidence(0.25)
    iou_thres: float = overlap(0.45)
    max_det: int = option(
        300, "with --nms: maximum number of detections per image", limits=between(1, 30_000), group=DETECTIONS
    )

    def contradictions(self) -> Iterator[str]:
        """Yield contradictions between options, as `--option: what is wrong`."""
        yield from super().contradictions()
        if not self.weights:
            yield "--weights '': name a weight file"
        if not self.source:
            yield "--source '': name an image, a folder or a pattern"
        if not self.include:
            yield "--include: name at least one format"
        if len(self.imgsz) not in (1, 2):
            yield f"--imgsz: takes one number, or height and width, not {len(self.imgsz)} numbers"
        for name, (value, oldest) in _OLDEST_OPSETS.items():
            if "onnx" in self.include and getattr(self, name) is value and self.opset < oldest:
                flag = f"--{name}" if value else f"--no-{name}"
                yield f"--opset {self.opset}: with {flag} give {oldest} or newer, or leave that out"

    def warnings(self) -> Iterator[str]:
        """Yield warnings about options without effect."""
        if self.data:
            yield "--data has no effect: a weight file knows its classes"
        if not self.nms:
            for name in sorted(self.given & {"agnostic_nms", "conf_thres", "iou_thres", "max_det"}):
                yield f"--{name.replace('_', '-')} has no effect without --nms"
        if set(self.include) == {"torchscript"}:
            for name in sorted(self.given & {"opset", "simplify"}):
                yield f"--{name} has no effect on TorchScript files"
        if self.dynamic and "batch_size" in self.given:
            yield "--batch-size has no effect with --dynamic"
