"""What detect.py does: find objects in pictures, videos and streams, and draw them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.checkpoint import build_model, read_checkpoint, resolve_weights
from utils.boxes import NmsRules
from utils.config.dataset import load_names
from utils.config.files import next_run_folder
from utils.config.options import DetectOptions
from utils.datasets.images import Image
from utils.device import select_device
from utils.errors import UsageError, UserError
from utils.inference.frames import Frame, Source
from utils.inference.outputs import OutputChoice, Outputs
from utils.inference.predictor import (
    Predictor,
    half_precision,
    in_words,
    prepare_model,
    rescale_detections,
)
from utils.inference.preprocess import fitting_image_size, letterbox_image
from utils.inference.sources import open_source
from utils.inference.viewer import Viewer
from utils.reporting.console import Console
from utils.reporting.draw import draw_boxes


@dataclass(frozen=True)
class DrawStyle:
    """How boxes look on pictures."""

    line_thickness: int = 3
    hide_labels: bool = False
    hide_conf: bool = False


class Detector:
    """Finds objects in single frames of any size."""

    def __init__(self, predictor: Predictor, names: Sequence[str], size_hw: tuple[int, int]) -> None:
        self.predictor, self.names, self.size_hw = predictor, list(names), size_hw
        self.stride = predictor.model.size_multiple
        if predictor.device.type == "cuda":
            # The first pass sets up the card; it belongs to no picture's time.
            predictor.predict(torch.zeros(1, 3, *size_hw, device=predictor.device))
            predictor.watch.reset()

    def __call__(self, image: Image) -> Tensor:
        """Detections (n, 6) on the CPU: box in pixels of the image (H, W, 3) BGR, confidence, class."""
        watch = self.predictor.watch
        watch.start()
        pixels, letterbox = letterbox_image(image, self.size_hw, self.stride)
        images = pixels.to(self.predictor.device).float().div_(255)
        watch.lap("preprocess")
        (found,) = self.predictor.predict(images)
        return rescale_detections(found.cpu(), letterbox)

    def in_words(self, detections: Tensor) -> str:
        """How many of each class, as in "2 person, 1 dog"."""
        counts = Counter(int(label) for label in detections[:, 5].tolist())
        return ", ".join(f"{n} {self.names[label]}" for label, n in sorted(counts.items())) or "nothing"


def run_detect(options: DetectOptions, console: Console | None = None) -> Path | None:
    """Detects in `options.source`; gives the folder with the results, None where nothing is written."""
    console = console or Console()
    device = select_device(options.device)
    source = open_source(options.source, options.vid_stride, console.warn)
    detector = _detector(options, device, console)
    choice = OutputChoice(
        pictures=not options.nosave,
        labels=options.save_txt,
        confidences=options.save_conf,
        crops=options.save_crop,
        table=options.save_csv,
        vid_stride=options.vid_stride,
    )
    style = DrawStyle(options.line_thickness, options.hide_labels, options.hide_conf)
    viewer = Viewer(options.view_img, console.warn)
    with ExitStack() as stack:
        folder = outputs = None
        if choice.anything:
            folder = next_run_folder(Path(options.project), options.name, options.exist_ok)
            outputs = stack.enter_context(Outputs(folder, detector.names, choice, source.files))
        stack.callback(viewer.close)
        count = _detect_all(source, detector, outputs, viewer, style, console)
    _summarise(source, detector, count, console)
    if outputs is not None:
        labels = f", {outputs.labels.count} label files in {folder}/labels" if outputs.labels else ""
        console.info(f"results in {folder}{labels}")
    return folder


def _detector(options: DetectOptions, device: torch.device, console: Console) -> Detector:
    half = half_precision(options.half, device, console)
    weights = resolve_weights(options.weights)
    model = prepare_model(build_model(read_checkpoint(weights)), device, half)
    names = list(model.names)
    if options.data:
        names = load_names(options.data)
        if len(names) != model.nc:
            raise UserError(
                f"has {len(names)} class names, {weights} knows {model.nc} classes",
                options.data,
                "leave --data out to use the names inside the weights",
            )
    wrong = [number for number in options.classes or () if not 0 <= number < model.nc]
    if wrong:
        raise UsageError(f"there is no class {wrong[0]}", "--classes", f"0 to {model.nc - 1} in {weights}")
    rules = NmsRules(
        conf_thres=options.conf_thres,
        iou_thres=options.iou_thres,
        classes=options.classes or None,
        agnostic=options.agnostic_nms,
        max_det=options.max_det,
    )
    sides = fitting_image_size(options.imgsz, model.size_multiple, console)
    size_hw = sides[0], sides[-1]
    console.info(f"{weights} on {in_words(model, device, max(size_hw))}")
    return Detector(Predictor(model, rules, half=half, augment=options.augment), names, size_hw)


def _detect_all(
    source: Source,
    detector: Detector,
    outputs: Outputs | None,
    viewer: Viewer,
    style: DrawStyle,
    console: Console,
) -> int:
    """Detects in every frame; gives their number. Ends early when the viewer is closed."""
    count = 0
    for frame in source:
        detections = detector(frame.image)
        watch = detector.predictor.watch
        height, width = frame.image.shape[:2]
        console.info(
            f"{frame.place} {frame.source}: {width}x{height}, {detector.in_words(detections)}, "
            f"{1000 * watch.last['inference']:.1f} ms"
        )
        drawn = None
        if viewer.enabled or (outputs is not None and outputs.choice.pictures):
            drawn = _drawn(frame, detections, detector.names, style)
        if outputs is not None:
            outputs.write(frame, detections, drawn)
        count += 1
        if drawn is not None and not viewer.show(frame.source, drawn):
            break
    return count


def _drawn(frame: Frame, detections: Tensor, names: Sequence[str], style: DrawStyle) -> Image:
    """A copy of the frame with its boxes, the most confident on top."""
    flipped = detections.flip(0).numpy()
    return draw_boxes(
        frame.image.copy(),
        flipped[:, :4],
        flipped[:, 5].astype(np.int64),
        names,
        flipped[:, 4],
        line_thickness=style.line_thickness,
        hide_labels=style.hide_labels,
        hide_conf=style.hide_conf,
    )


def _summarise(source: Source, detector: Detector, count: int, console: Console) -> None:
    if count == 0:
        reasons = "; ".join(source.skipped[:3]) or "no frames"
        raise UserError(f"nothing could be read ({reasons})", "--source", "check the files")
    if source.skipped:
        console.warn(f"{len(source.skipped)} skipped: {'; '.join(source.skipped)}")
    speed = detector.predictor.watch.milliseconds_per_image()
    console.info(
        f"{count} pictures or frames: {speed['preprocess']:.1f} ms pre-process, "
        f"{speed['inference']:.1f} ms inference, {speed['nms']:.1f} ms NMS each"
    )
