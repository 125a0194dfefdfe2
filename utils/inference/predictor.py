"""Forward pass and NMS, shared by test.py, detect.py and validation during training.

Shapes: B images, N predictions per image, K classes, D rows of detections, n detections in an image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor

from models.ensemble import Network
from models.yolo import Model
from utils.batch import Letterbox, StudentOutput
from utils.boxes import MOST_OF_BEST, NmsRules, suppress, suppress_best, suppress_rows
from utils.cuda_graphs.capture import CapturePlace
from utils.cuda_graphs.frozen import Replayed, recorded
from utils.device import describe_device
from utils.inference.exported import ExportedNetwork
from utils.losses.recipe import Body
from utils.reporting.console import Console

Phase = Literal["preprocess", "inference", "nms"]
PHASES: tuple[Phase, ...] = ("preprocess", "inference", "nms")
MAX_REPLAYED_SHAPES = 4


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
        """End a phase and start the next."""
        now = self._now()
        self.add(phase, now - self._start)
        self._start = now

    def add(self, phase: Phase, seconds: float) -> None:
        """Count time that a phase took; `last` holds what was added last."""
        self.last[phase] = seconds
        self.seconds[phase] += seconds

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
        self,
        model: Network | ExportedNetwork,
        rules: NmsRules,
        *,
        half: bool = False,
        augment: bool = False,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        """`half`: run the forward pass in float16 (CUDA only); `augment`: use test-time augmentation.

        Neither is available for exported networks. warn: given this, the network's passes are run as CUDA
        graphs on a GPU, for shapes seen repeatedly; it gets a message if that fails.
        """
        self.model, self.rules, self.augment = model, rules, augment
        exported = isinstance(model, ExportedNetwork)
        assert not (exported and (half or augment)), "an exported network computes in one way"
        self.device = model.device if isinstance(model, ExportedNetwork) else next(model.parameters()).device
        self.half = half
        assert not half or self.device.type == "cuda", "float16 is for CUDA alone"
        self.watch = Stopwatch(self.device)
        on_gpu = self.device.type == "cuda"
        self.best_alone = on_gpu and isinstance(model, Model) and not (augment or rules.multi_label)
        self._body: Body | None = None
        if warn is not None and on_gpu and not (exported or augment):
            record = partial(recorded, place=CapturePlace(self.device))
            self._body = Replayed(cast(Network, model).forward_features, warn, record, MAX_REPLAYED_SHAPES)

    def predict(self, images: Tensor) -> list[Tensor]:
        """Return the detections, B tensors (n, 6): x1, y1, x2, y2 in px of the batch, confidence, class.

        images: (B, 3, H, W) RGB, float 0..1, on the model's device; H and W multiples of the largest
        stride.
        """
        return self.begin(images)()

    @torch.no_grad()
    def begin(self, images: Tensor) -> Callable[[], list[Tensor]]:
        """Start `predict`; return a function that completes it.

        On a GPU it is only enqueued where possible, so that other work can be done meanwhile, also the next
        call of this method.
        """
        self.watch.images += len(images)
        if self.best_alone:
            return self._enqueued(images)
        self.watch.start()
        passed = self.forward(images)
        self.watch.lap("inference")
        detections = self.suppress(passed)
        self.watch.lap("nms")
        return lambda: detections

    def _enqueued(self, images: Tensor) -> Callable[[], list[Tensor]]:
        """Enqueue the forward pass and the copy of the best predictions; NMS runs in main memory."""
        model = cast(Model, self.model)
        marks = [_mark(self.device)]
        levels = self.forward(images).levels
        marks.append(_mark(self.device))
        best = model.decode_best(levels, MOST_OF_BEST).to("cpu", non_blocking=True)
        marks.append(_mark(self.device))

        def complete() -> list[Tensor]:
            last = marks[-1]
            if last is not None:
                last.synchronize()
                self.watch.add("inference", _seconds_between(marks[0], marks[1]))
            begun = time.perf_counter()
            kept = suppress_best(best, sum(level[0, ..., 0].numel() for level in levels), self.rules)
            if kept is None:
                kept = suppress(model.decode_levels(levels), self.rules)
            detections = [one.detections for one in kept]
            self.watch.add("nms", _seconds_between(marks[1], last) + time.perf_counter() - begun)
            return detections

        return complete

    @torch.no_grad()
    def forward(self, images: Tensor) -> ForwardOutput:
        """Run the forward pass; an exported network with NMS inside returns detections (B, D, 6)."""
        if isinstance(self.model, ExportedNetwork):
            return ForwardOutput(decoded=self.model(images))
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            if self.augment:
                return ForwardOutput(decoded=self.model.forward_augmented(images))
            features = (self._body or self.model.forward_features)(images)
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


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """Record a point in the work of a GPU; None on a CPU, where nothing is enqueued."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds_between(first: torch.cuda.Event | None, second: torch.cuda.Event | None) -> float:
    if first is None or second is None:
        return 0.0
    return float(first.elapsed_time(second)) / 1000


def rescale_boxes(boxes_xyxy_px: Tensor, letterbox: Letterbox) -> Tensor:
    """Map boxes (n, 4) from a batch image to pixels of the original image, clipped to it."""
    pad, scale = _by_corner(letterbox.pad, boxes_xyxy_px), _by_corner(letterbox.scale, boxes_xyxy_px)
    limit = _by_corner(letterbox.original_hw, boxes_xyxy_px)
    return _rescaled(boxes_xyxy_px, pad, scale, limit)


def _rescaled(boxes: Tensor, pad: Tensor, scale: Tensor, limit: Tensor) -> Tensor:
    return ((boxes - pad) / scale).clamp(min=0).minimum(limit)


def place_boxes(boxes_xyxy_px: Tensor, letterbox: Letterbox) -> Tensor:
    """Map boxes (n, 4) from an original image to pixels of the batch image."""
    pad, scale = _by_corner(letterbox.pad, boxes_xyxy_px), _by_corner(letterbox.scale, boxes_xyxy_px)
    return boxes_xyxy_px * scale + pad


def rescale_each(found: Sequence[Tensor], letterboxes: Sequence[Letterbox]) -> list[Tensor]:
    """Map the boxes of detections (n, 6) of each image from the batch's to pixels of the original image.

    As `rescale_boxes`, for all images together, which takes far fewer operations.
    """
    together = torch.cat(list(found))
    counts = [len(one) for one in found]
    facts = [(*box.pad, *box.scale, *box.original_hw) for box in letterboxes]
    # Six numbers of each detection's image, height before width.
    own = together.new_tensor(facts).repeat_interleave(torch.tensor(counts, device=together.device), 0)
    pads, scales, limits = (own[:, first : first + 2].flip(1).repeat(1, 2) for first in (0, 2, 4))
    boxes = _rescaled(together[:, :4], pads, scales, limits)
    return list(torch.split(torch.cat((boxes, together[:, 4:]), 1), counts))


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
