"""Forward pass and NMS, shared by test.py, detect.py and validation during training.

Shapes: B images, N predictions per image, K classes, D rows of detections, n detections in an image.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from models.ensemble import Network
from models.yolo import Model
from utils.batch import Letterbox, StudentOutput
from utils.boxes import NmsRules, suppress, suppress_rows
from utils.device import describe_device
from utils.inference.exported import ExportedNetwork
from utils.reporting.console import Console

Phase = Literal["preprocess", "inference", "nms"]
PHASES: tuple[Phase, ...] = ("preprocess", "inference", "nms")


def prepare_model(model: Model, device: torch.device, half: bool = False) -> Model:
    """Prepare the model for inference only: eval mode, fused, channels-last, no gradients.

    Changes the model in place. `half`: see `halved`.
    """
    model = model.to(device).fuse().eval().requires_grad_(False)
    if half:
        model = halved(model)
    return model.to(memory_format=torch.channels_last)


def halved(model: Model) -> Model:
    """Convert the model's weights to float16, in place.

    The anchors stay float32: a box is an anchor times a factor, and a relative error of 1/2000 would be
    visible in a box of 600 px.
    """
    anchors = model.head.anchors
    model = model.half()
    model.head.anchors = anchors
    return model


@dataclass
class Stopwatch:
    """Seconds spent in each phase, and the number of images.

    CUDA kernels run asynchronously, so `start` and `lap` synchronise with the GPU.
    """

    device: torch.device
    seconds: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    images: int = 0
    last: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    _start: float = 0.0

    def reset(self) -> None:
        """Discard all measurements."""
        self.seconds, self.last, self.images = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0), 0

    def start(self) -> None:
        """Start a phase."""
        self._start = self._now()

    def lap(self, phase: Phase) -> None:
        """End a phase and start the next; `last` holds the seconds that it took."""
        now = self._now()
        self.last[phase], self._start = now - self._start, now
        self.seconds[phase] += self.last[phase]

    def milliseconds_per_image(self) -> dict[Phase, float]:
        """Return the mean time of each phase."""
        return {phase: 1000 * taken / max(self.images, 1) for phase, taken in self.seconds.items()}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class ForwardOutput:
    """The result of a forward pass: the Detect layer's inputs and raw outputs, or decoded predictions.

    decoded: (B, N, 5 + K) from an augmented pass or an exported network, detections (B, D, 6) from one with
    NMS inside; None if there are levels.
    """

    features: tuple[Tensor, ...] = ()
    levels: tuple[Tensor, ...] = ()
    decoded: Tensor | None = None

    @property
    def output(self) -> StudentOutput | None:
        """The input of a loss, with levels in float32; None if the pass is decoded."""
        if self.decoded is not None:
            return None
        return StudentOutput(self.features, tuple(level.float() for level in self.levels))


class Predictor:
    """A network with its NMS parameters.

    Does not change the model; `prepare_model` makes it fast. `watch` holds the times. If an exported network
    includes NMS, the confidence threshold, classes and `max_det` are applied to its detections.
    """

    def __init__(
        self, model: Network | ExportedNetwork, rules: NmsRules, *, half: bool = False, augment: bool = False
    ) -> None:
        """`half`: run the forward pass in float16 (CUDA only); `augment`: use test-time augmentation.

        Neither is available for exported networks.
        """
        self.model, self.rules, self.augment = model, rules, augment
        exported = isinstance(model, ExportedNetwork)
        assert not (exported and (half or augment)), "an exported network computes in one way"
        self.device = model.device if isinstance(model, ExportedNetwork) else next(model.parameters()).device
        self.half = half
        assert not half or self.device.type == "cuda", "float16 is for CUDA alone"
        self.watch = Stopwatch(self.device)

    @torch.no_grad()
    def predict(self, images: Tensor) -> list[Tensor]:
        """Return the detections, B tensors (n, 6): x1, y1, x2, y2 in px of the batch, confidence, class.

        images: (B, 3, H, W) RGB, float 0..1, on the model's device; H and W multiples of the largest
        stride.
        """
        self.watch.start()
        passed = self.forward(images)
        self.watch.lap("inference")
        detections = self.suppress(passed)
        self.watch.lap("nms")
        self.watch.images += len(images)
        return detections

    @torch.no_grad()
    def forward(self, images: Tensor) -> ForwardOutput:
        """Run the forward pass; an exported network with NMS inside returns detections (B, D, 6)."""
        if isinstance(self.model, ExportedNetwork):
            return ForwardOutput(decoded=self.model(images))
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            if self.augment:
                return ForwardOutput(decoded=self.model.forward_augmented(images))
            features = self.model.forward_features(images)
            return ForwardOutput(features, self.model.forward_head(features))

    def suppress(self, passed: ForwardOutput) -> list[Tensor]:
        """Apply NMS to a forward pass; raw levels are decoded only above the confidence threshold.

        Boxes are decoded in float32, whatever the precision of the network.
        """
        if passed.decoded is None:
            assert not isinstance(self.model, ExportedNetwork)
            chosen = self.model.decode_above(passed.levels, self.rules.conf_thres)
            kept = suppress_rows(*chosen, len(passed.levels[0]), self.rules)
        elif isinstance(self.model, ExportedNetwork) and self.model.facts.nms is not None:
            return [self._among(rows) for rows in passed.decoded]
        else:
            kept = suppress(passed.decoded, self.rules)
        return [one.detections for one in kept]

    def _among(self, rows: Tensor) -> Tensor:
        """Filter detections (D, 6) after NMS by the predictor's rules; rows with confidence 0 are padding."""
        allowed = rows[:, 4] > self.rules.conf_thres
        if self.rules.classes is not None:
            allowed &= torch.isin(
                rows[:, 5].long(), torch.tensor(list(self.rules.classes), device=rows.device)
            )
        return rows[allowed][: self.rules.max_det]


def rescale_boxes(boxes_xyxy_px: Tensor, letterbox: Letterbox) -> Tensor:
    """Map boxes (n, 4) from a batch image to pixels of the original image, clipped to it."""
    pad, scale = _by_corner(letterbox.pad, boxes_xyxy_px), _by_corner(letterbox.scale, boxes_xyxy_px)
    limit = _by_corner(letterbox.original_hw, boxes_xyxy_px)
    return ((boxes_xyxy_px - pad) / scale).clamp(min=0).minimum(limit)


def place_boxes(boxes_xyxy_px: Tensor, letterbox: Letterbox) -> Tensor:
    """Map boxes (n, 4) from an original image to pixels of the batch image."""
    pad, scale = _by_corner(letterbox.pad, boxes_xyxy_px), _by_corner(letterbox.scale, boxes_xyxy_px)
    return boxes_xyxy_px * scale + pad


def rescale_detections(detections: Tensor, letterbox: Letterbox) -> Tensor:
    """Map the boxes of detections (n, 6) from a batch image to pixels of the original image."""
    boxes = rescale_boxes(detections[:, :4], letterbox)
    return torch.cat((boxes, detections[:, 4:]), dim=1)


def _by_corner(height_width: tuple[float, float], like: Tensor) -> Tensor:
    """Return (height, width) as a tensor (x, y, x, y), on the device of `like`."""
    height, width = height_width
    return like.new_tensor((width, height, width, height))


def half_precision(wanted: bool, device: torch.device, console: Console) -> bool:
    """Return whether to compute in float16; warns if it is requested on a device other than CUDA."""
    if wanted and device.type != "cuda":
        console.warn(f"--half needs a CUDA device: computing in float32 on the {device.type}")
        return False
    return wanted


def in_words(model: Network, device: torch.device, image_size: int) -> str:
    """Describe a network's device and size, for the first line of a run."""
    size = model.summary(image_size)
    counts = f"{size.layers} layers (fused), {size.parameters:,} parameters"
    return f"{describe_device(device)}: {counts}, {size.cost}"
