"""Networks for Python programs: `load` gives one that takes pictures in any form and returns boxes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.checkpoint import build_model, read_checkpoint, transfer_weights
from models.yolo import Model
from utils.boxes import NmsRules
from utils.datasets.images import Image, UnreadableImageError, decode_image, read_image
from utils.device import select_device
from utils.errors import UserError
from utils.inference.backends import find_network, load_network, settle
from utils.inference.detector import Detector
from utils.inference.exported import Exported
from utils.inference.frames import Frame, file_name, is_address, without_password
from utils.inference.pipeline import in_groups
from utils.inference.predictor import Predictor, prepare_model
from utils.inference.preprocess import fitting_image_size
from utils.inference.remote import fetch
from utils.inference.results import Detections
from utils.reporting.console import Console

_MOST_CHANNELS = 4
_TAKEN = "give a path, an address, the bytes of a file, a PIL picture or an array (H, W, 3) of uint8 in RGB"


def load(weights: str | Path = "yolov5s.pt", device: str = "", verbose: bool = True) -> HubModel:
    """The network in weights (.pt, .onnx, .torchscript, an OpenVINO folder), ready to be called on pictures.

    device: cpu, or a GPU's number; "" takes the first GPU, else the CPU. verbose: say what was loaded.

    Raises:
        UserError: there is no such file, or it is no such network.
    """
    path = find_network(os.fspath(weights))
    return HubModel(load_network(path, select_device(device)), os.fspath(path), verbose)


def bare(path: str | Path, device: str = "") -> Model:
    """The network in a .pt file as a torch module that can be trained on. Raises UserError as `load` does."""
    return build_model(read_checkpoint(find_network(os.fspath(path)))).to(select_device(device))


def load_or_create(
    name: str, pretrained: bool = True, channels: int = 3, classes: int = 80, device: str = ""
) -> Model:
    """The bare network of a size such as "yolov5s", for training and experiments.

    pretrained: with its public weights, as far as they fit other `classes` and `channels`.

    Raises:
        UserError: the weights are not there.
    """
    if not pretrained:
        return Model(f"{name}.yaml", channels=channels, nc=classes).to(select_device(device))
    checkpoint = read_checkpoint(find_network(f"{name}.pt"))
    if (channels, classes) == (3, len(checkpoint.names)):
        return build_model(checkpoint).to(select_device(device))
    model = Model(f"{name}.yaml", channels=channels, nc=classes)
    transfer_weights(model, checkpoint)
    return model.to(select_device(device))


class HubModel:
    """A network that is called with pictures and gives Detections.

    conf, iou, classes (numbers, None for all), max_det, agnostic, multi_label: the rules by which boxes are
    kept, to be set as one likes. names: of the classes, by number. stride: what sides are multiples of, px.
    """

    def __init__(self, network: Model | Exported, source: str = "", verbose: bool = False) -> None:
        """`network`: as `load_network` or `prepare_model` give it."""
        self.conf, self.iou, self.max_det = 0.25, 0.45, 1000
        self.classes: Sequence[int] | None = None
        self.agnostic = self.multi_label = False
        self._console = Console(quiet=not verbose)
        if isinstance(network, Exported):
            settle(network, [640], False, (), "names", self._console)
        self.model = network
        self.names = dict(enumerate(network.names))
        self.stride = network.size_multiple
        self._console.info(f"{source}: {len(self.names)} classes, stride {self.stride}")

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return Predictor(self.model, NmsRules()).device

    def __call__(self, pictures: Any, size: int | tuple[int, int] = 640, augment: bool = False) -> Detections:
        """The detections in one picture or a list of them, at a size in px (or height and width).

        A picture is a path, an http or https address, the bytes of an encoded file, a PIL picture, or a NumPy
        array of uint8: (H, W, 3) in RGB (OpenCV's are BGR: pass `image[..., ::-1]`), (H, W), or the channels
        first. augment: average over three sizes and a flip.

        Raises:
            UserError: something is no picture, or cannot be read.
        """
        given = list(pictures) if isinstance(pictures, list | tuple) else [pictures]
        frames = [_frame(picture, number) for number, picture in enumerate(given)]
        sides = (size, size) if isinstance(size, int) else tuple(size)
        detector = Detector(self._predictor(augment), list(self.names.values()), self._size(sides))
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

    def to(self, device: str | torch.device) -> HubModel:
        """Moves the network to another device. Raises UserError for an exported one."""
        if isinstance(self.model, Exported):
            raise UserError(
                "stays on the device that it was loaded on",
                self.model.path,
                "load it again: load(path, device)",
            )
        self.model.to(device)
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
        rules = NmsRules(
            conf_thres=self.conf,
            iou_thres=self.iou,
            classes=self.classes,
            agnostic=self.agnostic,
            multi_label=self.multi_label,
            max_det=self.max_det,
        )
        return Predictor(self.model, rules, augment=augment)

    def _size(self, sides: Sequence[int]) -> tuple[int, int]:
        if isinstance(self.model, Exported) and self.model.facts.size_hw is not None:
            return self.model.facts.size_hw
        height, width = fitting_image_size(sides, self.stride, self._console)
        return height, width


def ready(model: Model, device: str = "") -> HubModel:
    """A bare network made ready for pictures. Raises UserError where it takes none of three channels."""
    if model.channels != 3:
        raise UserError(
            f"takes {model.channels} channels", "channels", "use autoshape=False for the bare network"
        )
    return HubModel(prepare_model(model, select_device(device)))


def _frame(picture: Any, number: int) -> Frame:
    """A picture in any form, as BGR with a name."""
    name = f"image{number}.jpg"
    try:
        if isinstance(picture, str | os.PathLike):
            path = os.fspath(picture)
            if is_address(path):
                address = without_password(path)
                return Frame(decode_image(fetch(path)), file_name(address) or name)
            return Frame(read_image(Path(path).expanduser()), path)
        if isinstance(picture, bytes | bytearray | memoryview):
            return Frame(decode_image(bytes(picture)), name)
    except UnreadableImageError as error:
        shown = (
            without_password(str(picture)) if isinstance(picture, str | os.PathLike) else f"picture {number}"
        )
        raise UserError(f"cannot be read ({error})", shown, "check the path or the address") from error
    if hasattr(picture, "convert") and hasattr(picture, "getexif"):
        from PIL import ImageOps

        upright = ImageOps.exif_transpose(picture).convert("RGB")
        named = getattr(picture, "filename", "") or name
        return Frame(_from_array(np.asarray(upright), number), str(named))
    return Frame(_from_array(picture, number), name)


def _from_array(array: Any, number: int) -> Image:
    """An RGB array as a BGR picture. Raises UserError for what is none."""
    if not isinstance(array, np.ndarray):
        raise UserError(f"is a {type(array).__name__}", f"picture {number}", _TAKEN)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or not array.size:
        raise UserError(f"is an array {array.shape} of {array.dtype}", f"picture {number}", _TAKEN)
    if array.ndim == 2:
        array = array[..., None]
    elif array.shape[2] > _MOST_CHANNELS and array.shape[0] <= _MOST_CHANNELS:
        array = array.transpose(1, 2, 0)
    if array.shape[2] not in (1, 3, 4):
        raise UserError(f"is an array {array.shape}", f"picture {number}", _TAKEN)
    if array.shape[2] == 1:
        array = array.repeat(3, 2)
    return np.ascontiguousarray(array[..., 2::-1])
