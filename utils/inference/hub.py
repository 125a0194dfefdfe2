"""Networks for Python programs: `load` gives one that takes images in any form and returns boxes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.checkpoint import build_model, read_checkpoint
from models.transfer import transfer_weights
from models.yolo import Model
from utils.boxes import NmsRules
from utils.errors import UserError
from utils.inference.arguments import Device, device_of, frame_of, rules_of, sides_of
from utils.inference.backends import find_network, load_network, settle
from utils.inference.detector import Detector
from utils.inference.exported import Exported
from utils.inference.pipeline import in_groups
from utils.inference.predictor import Predictor, prepare_model
from utils.inference.preprocess import fitting_image_size
from utils.inference.results import Detections
from utils.reporting.console import Console
from utils.words import counted


def load(weights: str | Path = "yolov5s.pt", device: Device = "", verbose: bool = True) -> HubModel:
    """The network in weights (.pt, .onnx, .torchscript, an OpenVINO folder), ready to be called on images.

    device: cpu, a GPU's number or a torch.device; "" takes the first GPU, else the CPU. verbose: say what was
    loaded.

    Raises:
        UserError: there is no such file, or it is no such network.
    """
    path = find_network(os.fspath(weights))
    return HubModel(load_network(path, device_of(device)), os.fspath(path), verbose)


def bare(path: str | Path, device: Device = "") -> Model:
    """The network in a .pt file as a torch module that can be trained on. Raises UserError as `load` does."""
    return build_model(read_checkpoint(find_network(os.fspath(path)))).to(device_of(device))


def load_or_create(
    name: str, pretrained: bool = True, channels: int = 3, classes: int = 80, device: Device = ""
) -> Model:
    """The bare network of a size such as "yolov5s", for training and experiments.

    pretrained: with its public weights, as far as they fit other `classes` and `channels`.

    Raises:
        UserError: the weights are not there.
    """
    if not pretrained:
        return Model(f"{name}.yaml", channels=channels, nc=classes).to(device_of(device))
    checkpoint = read_checkpoint(find_network(f"{name}.pt"))
    if (channels, classes) == (3, len(checkpoint.names)):
        return build_model(checkpoint).to(device_of(device))
    model = Model(f"{name}.yaml", channels=channels, nc=classes)
    transfer_weights(model, checkpoint)
    return model.to(device_of(device))


class HubModel:
    """A network that is called with images and gives Detections.

    conf, iou, classes (a number or several, None for all), max_det, agnostic, multi_label: the rules by which
    boxes are kept, to be set as one likes. names: of the classes, by number. stride: what sides are multiples
    of, px.
    """

    def __init__(self, network: Model | Exported, source: str = "", verbose: bool = False) -> None:
        """`network`: as `load_network` or `prepare_model` give it."""
        self.conf, self.iou, self.max_det = 0.25, 0.45, 1000
        self.classes: int | Sequence[int] | None = None
        self.agnostic = self.multi_label = False
        self._console, self._has_warned_of_size = Console(quiet=not verbose), False
        if isinstance(network, Exported):
            settle(network, [640], False, (), "names", self._console)
        self.model = network
        self.names = dict(enumerate(network.names))
        self.stride = network.size_multiple
        self._console.info(f"{source}: {counted(len(self.names), 'class', 'classes')}, stride {self.stride}")

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return Predictor(self.model, NmsRules()).device

    def __call__(
        self, pictures: Any, size: int | Sequence[int] | None = None, augment: bool = False
    ) -> Detections:
        """The detections in one image or a list of them, at a size in px (or height and width), else 640.

        An image is a path, an http or https address, the bytes of an encoded file, a PIL image, or a NumPy
        array of uint8: (H, W, 3) in RGB (OpenCV's are BGR: pass `image[..., ::-1]`), (H, W), or the channels
        first. augment: average over three sizes and a flip.

        Raises:
            UserError: something is no image, or cannot be read; a rule or the size is outside of its range.
        """
        predictor, size_hw = self._predictor(augment), self._size(size)
        given = list(pictures) if isinstance(pictures, list | tuple) else [pictures]
        frames = [frame_of(picture, number) for number, picture in enumerate(given)]
        detector = Detector(predictor, list(self.names.values()), size_hw)
        found = []
        for group in in_groups(map(detector.prepare, frames), lambda one: one.pixels.shape, detector.batch):
            found += detector.detect(group)
        speed = detector.predictor.watch.milliseconds_per_image()
        return Detections(
            [np.ascontiguousarray(frame.image[..., ::-1]) for frame in frames],
            found,
            [frame.source for frame in frames],
            list(self.names.values()),
            (speed["preprocess"], speed["inference"], speed["nms"]),
        )

    def to(self, device: Device) -> HubModel:
        """Moves the network to another device. Raises UserError for an exported one, or if there is none."""
        if isinstance(self.model, Exported):
            raise UserError(
                "stays on the device that it was loaded on",
                self.model.path,
                "load it again: load(path, device)",
            )
        self.model.to(device_of(device))
        return self

    def cpu(self) -> HubModel:
        """Moves the network to the CPU."""
        return self.to("cpu")

    def cuda(self) -> HubModel:
        """Moves the network to the first GPU."""
        return self.to("cuda")

    def eval(self) -> HubModel:
        """Nothing: the network is ready for inference from the start."""
        return self

    def _predictor(self, augment: bool) -> Predictor:
        if augment and isinstance(self.model, Exported):
            raise UserError(
                "needs the network itself, and this one is exported", "augment", "load the .pt file"
            )
        rules = rules_of(
            self.conf,
            self.iou,
            self.classes,
            self.max_det,
            self.agnostic,
            self.multi_label,
            class_count=len(self.names),
        )
        return Predictor(self.model, rules, augment=augment)

    def _size(self, size: Any) -> tuple[int, int]:
        """Height and width to look at images at; a file of one shape has its own, which is said once."""
        sides = (640, 640) if size is None else sides_of(size)
        if isinstance(self.model, Exported) and self.model.facts.size_hw is not None:
            own = self.model.facts.size_hw
            if size is not None and sides != own and not self._has_warned_of_size:
                self._has_warned_of_size = True
                self._console.warn(
                    f"{self.model.path} takes images of {own[1]}x{own[0]} px alone: size has no effect"
                )
            return own
        height, width = fitting_image_size(sides, self.stride, self._console, "size")
        return height, width


def ready(model: Model, device: Device = "", name: str = "", verbose: bool = False) -> HubModel:
    """A bare network made ready for images. Raises UserError where it takes none of three channels.

    verbose: say of the network of that name what it is, as `load` does.
    """
    if model.channels != 3:
        raise UserError(
            f"takes {model.channels} channels", "channels", "use autoshape=False for the bare network"
        )
    return HubModel(prepare_model(model, device_of(device)), name, verbose)
