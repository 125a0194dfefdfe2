"""The Python API: `load` returns a model that is called with images in any form and returns detections."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from models.checkpoint import build_model, read_checkpoint
from models.ensemble import Network
from models.transfer import transfer_weights
from models.yolo import Model
from utils.config.options_base import MAX_SIDE
from utils.errors import UserError
from utils.inference.arguments import Device, batch_of, device_of, frame_of, rules_of, sides_of
from utils.inference.backends import configure_exported, find_network, load_networks
from utils.inference.detector import Detector
from utils.inference.exported import ExportedNetwork
from utils.inference.pipeline import in_groups
from utils.inference.predictor import Predictor, prepare_model
from utils.inference.preprocess import fitting_image_size
from utils.inference.results import Detections
from utils.reporting.console import Console
from utils.words import counted

Raw = tuple[Tensor, tuple[Tensor, ...] | None]  # predictions, and the levels that they were decoded from


def load(
    weights: str | Path | Sequence[str | Path] = "yolov5s.pt", device: Device = "", verbose: bool = True
) -> HubModel:
    """Load a model for inference; call it with images to get `Detections`.

    Args:
        weights: a .pt, .onnx or .torchscript file, the folder of an OpenVINO network, or several .pt files
            as an ensemble. Public weights such as yolov5s.pt are downloaded if they are missing.
        device: "cpu", a GPU index or a torch.device; "" means the first GPU, or the CPU if there is none.
        verbose: print a line about the loaded model.

    Raises:
        UserError: if there is no such file or device, or the file is not a network in a supported format.
    """
    names = [weights] if isinstance(weights, str | os.PathLike) else weights
    paths = [find_network(os.fspath(name)) for name in names]
    if not paths:
        raise UserError("names no weight file", "weights", "give a path, or several")
    network = load_networks(paths, device_of(device), half=False, console=Console(quiet=not verbose))
    return HubModel(network, " + ".join(map(str, paths)), verbose)


def bare(path: str | Path, device: Device = "") -> Model:
    """Load the network in a .pt file as a trainable torch module, in evaluation mode as it is loaded.

    Raises UserError as `load` does.
    """
    # In training mode a single pass would change the statistics of its batch norms.
    return build_model(read_checkpoint(find_network(os.fspath(path)))).to(device_of(device)).eval()


def load_or_create(
    name: str, pretrained: bool = True, channels: int = 3, classes: int = 80, device: Device = ""
) -> Model:
    """Return the bare torch module of a network size such as "yolov5s", for training and experiments.

    It is in evaluation mode if all of it is loaded; one with a new head, or without weights, is yet to be
    trained.

    Args:
        name: the size, also the name of the weight file.
        pretrained: load the public weights, as far as they fit `channels` and `classes`.
        channels: channels of the images.
        classes: the number of classes.
        device: as in `load`.

    Raises:
        UserError: if the weights or the device cannot be found.
    """
    if not pretrained:
        return Model(f"{name}.yaml", channels=channels, nc=classes).to(device_of(device))
    checkpoint = read_checkpoint(find_network(f"{name}.pt"))
    if (channels, classes) == (3, len(checkpoint.names)):
        return build_model(checkpoint).to(device_of(device)).eval()
    model = Model(f"{name}.yaml", channels=channels, nc=classes)
    transfer_weights(model, checkpoint)
    return model.to(device_of(device))


class HubModel:
    """A model for inference: called with images, it returns their `Detections`.

    The NMS settings are plain attributes, which may be changed between calls. For an exported file with NMS
    inside only conf, classes and max_det have an effect.

    Attributes:
        conf: minimum confidence of a detection, 0..1 (0.25).
        iou: maximum IoU of two detections of a class, 0..1 (0.45).
        classes: the class index or indices to detect; None for all.
        max_det: maximum number of detections per image (1000).
        agnostic: let boxes of different classes suppress each other too (False).
        multi_label: allow several classes for one box (False).
        names: class names by index; nc is their number.
        yaml: what the network was built from; None for an exported file and an ensemble.
        stride: image sides are padded to multiples of it, in px.
        model: the network itself.
    """

    def __init__(self, network: Network | ExportedNetwork, source: str = "", verbose: bool = False) -> None:
        """`network` comes from `load_network` or `prepare_model`; `source` is its name for the console."""
        self.conf, self.iou, self.max_det = 0.25, 0.45, 1000
        self.classes: int | Sequence[int] | None = None
        self.agnostic = self.multi_label = False
        self._half = False
        self._console, self._warned = Console(quiet=not verbose), set[str]()
        if isinstance(network, ExportedNetwork):
            configure_exported(network, [640], False, (), "names", self._console)
        self.model = network
        self.names = dict(enumerate(network.names))
        self.nc = len(self.names)
        self.yaml: dict[str, Any] | None = network.yaml if isinstance(network, Model) else None
        self.stride = network.size_multiple
        self._console.info(f"{source}: {counted(len(self.names), 'class')}, stride {self.stride}")

    @property
    def device(self) -> torch.device:
        """The device that the model runs on."""
        own = self.model
        return own.device if isinstance(own, ExportedNetwork) else next(own.parameters()).device

    @overload
    def __call__(self, ims: Tensor, size: Any = ..., augment: bool = ..., profile: bool = ...) -> Raw: ...

    @overload
    def __call__(self, ims: Any, size: Any = ..., augment: bool = ..., profile: bool = ...) -> Detections: ...

    def __call__(
        self,
        ims: Any,
        size: int | Sequence[int] | None = None,
        augment: bool = False,
        profile: bool = False,
    ) -> Detections | Raw:
        """Detect objects in an image or a list of images, or pass a tensor through the network.

        Args:
            ims: one image or several, each a path, an http or https address, the bytes of an encoded
                file, a PIL image, or a NumPy array of 0..255: (H, W, 3) in RGB (OpenCV's are BGR: pass
                `image[..., ::-1]`), (H, W), or channels first. Or a tensor (B, 3, H, W) in RGB, 0..1.
            size: image size for the model in px, or (height, width), rounded up to a multiple of `stride`;
                640 by default. An exported file of fixed shape and a tensor ignore it.
            augment: test-time augmentation: pool the predictions at three scales, one of them mirrored.
            profile: has no effect, and is for programs written for YOLOv5: the times are always in `t`.

        Returns:
            The detections, with boxes in pixels of the given images. For a tensor what the network gives,
            without NMS: predictions (B, N, 5 + classes) and its raw levels, or None where it has none
            (`augment`, exported files). Files with NMS inside give detections (B, D, 6) for predictions.

        Raises:
            UserError: if an image is invalid or cannot be read, a setting or `size` is out of range, or
                `augment` is requested of an exported network.
        """
        predictor = self._predictor(augment)
        if isinstance(ims, Tensor):
            return self._raw(ims, predictor)
        size_hw = self._size(size)
        given = list(ims) if isinstance(ims, list | tuple) else [ims]
        frames = [frame_of(image, number) for number, image in enumerate(given)]
        detector = Detector(predictor, list(self.names.values()), size_hw)
        found, shapes = [], []
        for group in in_groups(map(detector.prepare, frames), lambda one: one.pixels.shape, detector.batch):
            found += detector.detect(group)
            shapes.append(tuple(group[0].pixels.shape[2:]))
        speed = detector.predictor.watch.milliseconds_per_image()
        return Detections(
            [np.ascontiguousarray(frame.image[..., ::-1]) for frame in frames],
            found,
            [frame.source for frame in frames],
            list(self.names.values()),
            (speed["preprocess"], speed["inference"], speed["nms"]),
            (len(frames), 3, *(max((sides[i] for sides in shapes), default=0) for i in (0, 1))),
        )

    @torch.no_grad()  # not inference mode: the grid of `decode` is cached, and trainings use it too
    def _raw(self, ims: Tensor, predictor: Predictor) -> Raw:
        """Pass a batch through the network, without NMS. Raises UserError if it takes no such batch."""
        own = self.model
        size_hw = own.facts.size_hw if isinstance(own, ExportedNetwork) else None
        passed = predictor.forward(batch_of(ims, self.stride, size_hw).to(self.device))
        if passed.decoded is not None:
            return passed.decoded, None
        assert not isinstance(own, ExportedNetwork)
        return own.decode_levels(passed.levels), passed.levels

    def to(self, device: Device) -> HubModel:
        """Move the model to another device and return it.

        Raises:
            UserError: if the network is exported, or there is no such device.
        """
        if isinstance(self.model, ExportedNetwork):
            raise UserError(
                "stays on the device that it was loaded on",
                self.model.path,
                "load it again: load(path, device)",
            )
        self.model.to(device_of(device))
        return self

    def cpu(self) -> HubModel:
        """Move the model to the CPU and return it."""
        return self.to("cpu")

    def cuda(self) -> HubModel:
        """Move the model to the first GPU and return it."""
        return self.to("cuda")

    def eval(self) -> HubModel:
        """Return the model unchanged: it is always in eval mode."""
        return self

    def train(self, mode: bool = True) -> HubModel:
        """Return the model if `mode` is false. Raises UserError otherwise: its norms have been folded in."""
        if mode:
            raise UserError("this model is for inference", "train()", "load it with autoshape=False")
        return self

    def half(self) -> HubModel:
        """Compute in float16 where the network is on a GPU, and return the model. Weights stay float32."""
        if isinstance(self.model, ExportedNetwork):
            self._warn_once("half()", f"{self.model.path} computes in the precision that it was exported in")
        elif self.device.type != "cuda":
            self._warn_once("half()", f"the model is on the {self.device.type}")
        self._half = True
        return self

    @property
    def amp(self) -> bool:
        """Whether to compute in float16 on a GPU: `amp = True` is the same as `half()`."""
        return self._half

    @amp.setter
    def amp(self, wanted: bool) -> None:
        if wanted:
            self.half()
        else:
            self.float()

    def float(self) -> HubModel:
        """Compute in float32, as at first, and return the model."""
        self._half = False
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the network's parameters. Raises UserError if it is exported."""
        return self._module("parameters").parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the network's parameters with their names. Raises UserError if it is exported."""
        return self._module("parameters").named_parameters()

    def state_dict(self) -> dict[str, Any]:
        """Return the network's weights by name, norms folded in. Raises UserError if it is exported."""
        return self._module("state_dict").state_dict()

    def _module(self, wanted: str) -> Network:
        if isinstance(self.model, ExportedNetwork):
            raise UserError(f"is exported and has no {wanted}", self.model.path, "load the .pt file")
        return self.model

    def _predictor(self, augment: bool) -> Predictor:
        if augment and isinstance(self.model, ExportedNetwork):
            raise UserError(
                "needs the network itself, and this one is exported", "augment", "load the .pt file"
            )
        if isinstance(self.model, ExportedNetwork) and self.model.facts.nms is not None:
            for name, usual in (("iou", 0.45), ("agnostic", False), ("multi_label", False)):
                if getattr(self, name) != usual:
                    self._warn_once(name, f"{self.model.path} has NMS inside")
        rules = rules_of(
            self.conf,
            self.iou,
            self.classes,
            self.max_det,
            self.agnostic,
            self.multi_label,
            class_count=len(self.names),
        )
        half = self._half and self.device.type == "cuda" and not isinstance(self.model, ExportedNetwork)
        return Predictor(self.model, rules, half=half, augment=augment)

    def _size(self, size: Any) -> tuple[int, int]:
        """Return the (height, width) to run at; a file of fixed shape keeps its own, and warns once."""
        sides = (640, 640) if size is None else sides_of(size)
        if max(sides) > MAX_SIDE:
            raise UserError(f"{max(sides)} px are too many", "size", f"take at most {MAX_SIDE}")
        if isinstance(self.model, ExportedNetwork) and self.model.facts.size_hw is not None:
            own = self.model.facts.size_hw
            if size is not None and sides != own:
                self._warn_once("size", f"{self.model.path} takes images of {own[1]}x{own[0]} px alone")
            return own
        height, width = fitting_image_size(sides, self.stride, self._console, "size")
        return height, width

    def _warn_once(self, setting: str, reason: str) -> None:
        """Warn that a setting has no effect, unless that has been said."""
        if setting not in self._warned:
            self._warned.add(setting)
            self._console.warn(f"{reason}: {setting} has no effect")


def ready(model: Model, device: Device = "", name: str = "", verbose: bool = False) -> HubModel:
    """Prepare a bare torch module for inference. Raises UserError if it does not take three channels.

    name, verbose: print a line about the model under this name, as `load` does.
    """
    model.check_takes_colour("channels", "use autoshape=False for the bare network")
    return HubModel(prepare_model(model, device_of(device)), name, verbose)
