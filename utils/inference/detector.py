"""Detection in frames of any size: letterboxing, forward pass, NMS, and boxes in original pixels."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.batch import Letterbox
from utils.inference.exported import ExportedNetwork
from utils.inference.frames import Frame
from utils.inference.predictor import Predictor, rescale_each
from utils.inference.preprocess import letterbox_image
from utils.words import found_in_words

BATCH_ON_CPU, BATCH_ON_GPU = 1, 16


@dataclass(frozen=True)
class Prepared:
    """A frame and its letterboxed image, (1, 3, H, W) uint8 RGB. seconds: time taken to prepare it."""

    frame: Frame
    pixels: Tensor
    letterbox: Letterbox
    seconds: float


class Detector:
    """Detects objects in frames: call `prepare` for each, then `detect` for those of one shape together.

    batch: the number of frames to pass to `detect` at once. found: the number of detections so far.
    """

    def __init__(self, predictor: Predictor, names: Sequence[str], size_hw: tuple[int, int]) -> None:
        self.predictor, self.names, self.size_hw = predictor, list(names), size_hw
        self.stride = predictor.model.size_multiple
        self.batch, self.found = BATCH_ON_CPU, 0
        self.whole = False
        if isinstance(predictor.model, ExportedNetwork):
            # A fixed image shape must be filled by padding, and a fixed batch size should be, by images.
            self.whole = predictor.model.facts.size_hw is not None
            self.batch = predictor.model.facts.shape[0] or BATCH_ON_CPU
        elif predictor.device.type == "cuda":
            self.batch = BATCH_ON_GPU

    def warm_up(self) -> None:
        """Initialise a GPU by a first pass, which then counts towards no image's time."""
        predictor = self.predictor
        if predictor.device.type == "cuda" and not isinstance(predictor.model, ExportedNetwork):
            predictor.predict(torch.zeros(1, 3, *self.size_hw, device=predictor.device))
            predictor.watch.reset()

    def prepare(self, frame: Frame) -> Prepared:
        """Letterbox a frame's image. Does not use the network and may run in another thread."""
        begun = time.perf_counter()
        pixels, letterbox = letterbox_image(frame.image, self.size_hw, self.stride, self.whole)
        return Prepared(frame, pixels, letterbox, time.perf_counter() - begun)

    def detect(self, group: Sequence[Prepared]) -> list[Tensor]:
        """Return the detections of each frame, (n, 6) on the CPU: box in its pixels, confidence, class.

        All prepared images must have the same shape.
        """
        return self.start(group)()

    def start(self, group: Sequence[Prepared]) -> Callable[[], list[Tensor]]:
        """Start `detect`; return a function that completes it. A GPU computes meanwhile.

        The pixels may be overwritten once that function has returned.
        """
        begun = time.perf_counter()
        images = joined([one.pixels for one in group], self.predictor.device).float().div_(255)
        own = time.perf_counter() - begun
        self.predictor.watch.add("preprocess", own + sum(one.seconds for one in group))
        complete = self.predictor.begin(images)

        def finish() -> list[Tensor]:
            there = rescale_each([boxes.cpu() for boxes in complete()], [one.letterbox for one in group])
            found = _within_images(there)
            self.found += sum(map(len, found))
            return found

        return finish

    def in_words(self, detections: Tensor) -> str:
        """Count the detections per class, as in "2 persons, 1 dog"."""
        return found_in_words([int(label) for label in detections[:, 5].tolist()], self.names) or "nothing"


def _within_images(found: list[Tensor]) -> list[Tensor]:
    """Leave out boxes in the border around an image, of which clipping has left nothing."""
    together = torch.cat(found)
    has_area = (together[:, 2:4] > together[:, :2]).all(1)
    if bool(has_area.all()):  # almost always, and quicker than to look at each image
        return found
    masks = torch.split(has_area, [len(boxes) for boxes in found])
    return [boxes[mask] for boxes, mask in zip(found, masks, strict=True)]


def joined(pixels: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return images (1, 3, H, W) of main memory as one batch on a device."""
    if device.type != "cuda":
        return (torch.cat(list(pixels)) if len(pixels) > 1 else pixels[0]).to(device)
    # From pinned memory a copy is only enqueued.
    shape = (len(pixels), *pixels[0].shape[1:])
    pinned = torch.empty(shape, dtype=pixels[0].dtype, memory_format=torch.channels_last, pin_memory=True)
    return torch.cat(list(pixels), out=pinned).to(device, non_blocking=True)
