"""From frames of any size to their detections."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.batch import Letterbox
from utils.inference.exported import Exported
from utils.inference.frames import Frame
from utils.inference.predictor import Predictor, rescale_detections
from utils.inference.preprocess import letterbox_image
from utils.words import found_in_words

BATCH_ON_CPU, BATCH_ON_GPU = 1, 16


@dataclass(frozen=True)
class Prepared:
    """A frame with its image as the network takes it: (1, 3, H, W) uint8 RGB. seconds: that it took."""

    frame: Frame
    pixels: Tensor
    letterbox: Letterbox
    seconds: float


class Detector:
    """Finds objects in frames: `prepare` each, then `detect` in those of one shape together.

    batch: how many of them are worth a pass together. found: how many objects there were so far.
    """

    def __init__(self, predictor: Predictor, names: Sequence[str], size_hw: tuple[int, int]) -> None:
        self.predictor, self.names, self.size_hw = predictor, list(names), size_hw
        self.stride = predictor.model.size_multiple
        self.batch, self.found = BATCH_ON_CPU, 0
        self.whole = False
        if isinstance(predictor.model, Exported):
            # What takes one shape gets it, and what takes batches of one size gets them full.
            self.whole = predictor.model.facts.size_hw is not None
            self.batch = predictor.model.facts.shape[0] or BATCH_ON_CPU
        elif predictor.device.type == "cuda":
            self.batch = BATCH_ON_GPU
            # The first pass sets up the card; it belongs to no image's time.
            predictor.predict(torch.zeros(1, 3, *size_hw, device=predictor.device))
            predictor.watch.reset()

    def prepare(self, frame: Frame) -> Prepared:
        """The frame's image scaled and padded; needs no network and may run in another thread."""
        begun = time.perf_counter()
        pixels, letterbox = letterbox_image(frame.image, self.size_hw, self.stride, self.whole)
        return Prepared(frame, pixels, letterbox, time.perf_counter() - begun)

    def detect(self, group: Sequence[Prepared]) -> list[Tensor]:
        """Detections of each, (n, 6) on the CPU: box in pixels of its image, confidence, class.

        All images have the same shape.
        """
        watch = self.predictor.watch
        watch.start()
        pixels = torch.cat([one.pixels for one in group]) if len(group) > 1 else group[0].pixels
        images = pixels.to(self.predictor.device).float().div_(255)
        watch.lap("preprocess")
        watch.seconds["preprocess"] += sum(one.seconds for one in group)
        found = self.predictor.predict(images)
        self.found += sum(map(len, found))
        return [
            rescale_detections(boxes.cpu(), one.letterbox) for boxes, one in zip(found, group, strict=True)
        ]

    def in_words(self, detections: Tensor) -> str:
        """How many of each class, as in "2 persons, 1 dog"."""
        return found_in_words([int(label) for label in detections[:, 5].tolist()], self.names) or "nothing"
