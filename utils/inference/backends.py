"""Loading of networks for inference, from checkpoints and from exported files of any supported format."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from models.archive import EXPORTED
from models.checkpoint import build_model, read_checkpoint
from models.ensemble import Ensemble, Network
from models.names import ClassMap
from models.places import resolve_weights
from models.yolo import Model
from utils.config.options_inference import DetectOptions, InferenceOptions, TestOptions
from utils.device import describe_device
from utils.errors import UsageError, UserError
from utils.inference.classes import WantedClasses, fit_classes
from utils.inference.exported import ExportedNetwork, has_own_names
from utils.inference.onnx_backend import OnnxNetwork
from utils.inference.openvino_backend import OpenVinoNetwork
from utils.inference.predictor import half_precision, in_words, prepare_model
from utils.inference.preprocess import fitting_image_size
from utils.inference.torchscript_backend import TorchScriptNetwork
from utils.reporting.console import Console

ONNX, TORCHSCRIPT = EXPORTED
OPENVINO_FOLDER = "_openvino_model"
_ELSEWHERE = {
    ".engine": "TensorRT",
    ".mlmodel": "CoreML",
    ".mlpackage": "CoreML",
    ".pb": "TensorFlow",
    ".tflite": "TFLite",
}


def find_network(name: str, download: bool = True) -> Path:
    """Return the path of a weight file, or of an OpenVINO network's folder.

    download: whether to download public weights that are missing. Raises UserError if nothing is found.
    """
    path = Path(name)
    if path.suffix == ".xml" and os.path.isfile(path):
        path = path.parent
    if os.path.isdir(path):
        if any(path.glob("*.xml")):
            return path
        raise UserError(
            "is a folder, not a weight file", name, "name a file in it, or an OpenVINO network's folder"
        )
    return resolve_weights(name, download)


def is_exported(path: Path) -> bool:
    """Return whether a path is an exported network, not a checkpoint."""
    return os.path.isdir(path) or path.suffix.lower() in (ONNX, TORCHSCRIPT)


def load_network(path: Path, device: torch.device, half: bool = False) -> Model | ExportedNetwork:
    """Load the network in a checkpoint or an exported file, ready for inference.

    half: convert the weights to float16 (ignored for an exported file, which has a precision of its own).
    Raises UserError if the file is neither.
    """
    if not is_exported(path):
        if other := _ELSEWHERE.get(path.suffix.lower()):
            raise UserError(
                f"is a file for {other}, which is not supported", path, "take .onnx, .torchscript or .pt"
            )
        model = build_model(read_checkpoint(path))
        model.check_takes_colour(path)
        return prepare_model(model, device, half)
    network: ExportedNetwork
    if os.path.isdir(path):
        network = OpenVinoNetwork(path)
    elif path.suffix.lower() == ONNX:
        network = OnnxNetwork(path, device)
    else:
        network = TorchScriptNetwork(path, device)
    return network


def load_networks(
    paths: Sequence[Path],
    device: torch.device,
    half: bool,
    console: Console,
    wanted: WantedClasses | None = None,
) -> Network | ExportedNetwork:
    """Load the network in a file, or the ensemble of those in several .pt files, ready for inference.

    wanted: the classes that members of an ensemble are to predict; by default those of the first. Raises
    UserError if a member does not know them, or if one of several files is exported.
    """
    if len(paths) == 1:
        return load_network(paths[0], device, half)
    for path in filter(is_exported, paths):
        raise UserError("an exported network cannot be part of an ensemble", path, "name .pt files only")
    members: list[Model] = []
    for path in paths:
        member = load_network(path, device, half)
        assert isinstance(member, Model)
        fit_classes(member, wanted or _those_of_first(members or [member], paths[0], member), path, console)
        members.append(member)
    return Ensemble(members)


def _those_of_first(members: Sequence[Model], path: Path, member: Model) -> WantedClasses:
    """Return the classes of the first member, whose file is `path`, as those wanted of another."""
    names = list(members[0].names)
    would_fit = has_own_names(names) and not ClassMap.by_name(names, member.names).unknown
    return WantedClasses(names, str(path), ", or name this file first" if would_fit else "")


def open_networks(
    options: InferenceOptions, device: torch.device, console: Console, wanted: WantedClasses | None = None
) -> tuple[Network | ExportedNetwork, str, bool]:
    """Load what `--weights` names; also return its name for messages and whether it computes in float16.

    `wanted` is as for `load_networks`. Raises UserError or UsageError if the options do not fit it.
    """
    paths = [find_network(name, options.fetches) for name in options.weights]
    exported = is_exported(paths[0])
    if exported and len(paths) == 1:
        refuse_for_exported(paths[0], options.augment, options.half, console)
    half = not exported and half_precision(options.half, device, console)
    return load_networks(paths, device, half, console, wanted), " + ".join(map(str, paths)), half


def refuse_for_exported(path: Path, augment: bool, half: bool, console: Console) -> None:
    """Raise UsageError for an option that requires a .pt file; warn about one that has no effect."""
    if augment:
        raise UsageError(
            f"needs the network itself, and {path} is exported", "--augment", "give the .pt file"
        )
    if half:
        console.warn(f"--half has no effect: {path} has the precision that it was exported with")


def configure_exported(
    network: ExportedNetwork,
    sides: Sequence[int],
    given: bool,
    names: Sequence[str],
    source: object,
    console: Console,
) -> tuple[int, int]:
    """Return the (height, width) at which to run an exported network, after a trial run; set its class names.

    sides: from --imgsz. given: whether the user set them. names: class names from `source`, for a file
    without its own. Raises UserError if the network cannot be used.
    """
    wanted = sides[0], sides[-1]
    size_hw = network.facts.size_hw
    if size_hw is None:
        fitting = fitting_image_size(sides, network.size_multiple, console)
        size_hw = fitting[0], fitting[-1]
    elif given and size_hw != wanted:
        console.warn(
            f"{network.path} takes images of {size_hw[1]}x{size_hw[0]} px alone: --imgsz has no effect"
        )
    if not network.facts.knows_shape:
        network.set_input_size(size_hw)
    network.probe()
    network.set_names(names, source)
    return size_hw


def warn_of_nms_inside(
    network: ExportedNetwork, options: DetectOptions | TestOptions, console: Console
) -> None:
    """Warn about options without effect, or a weaker one, because of NMS inside an exported file."""
    inside, given = network.facts.nms, options.given
    if inside is None:
        return
    if "conf_thres" in given and options.conf_thres < inside.conf_thres:
        console.warn(f"--conf-thres: nothing below {inside.conf_thres:g} comes out of {network.path}")
    if "max_det" in given and options.max_det > inside.max_det:
        console.warn(f"--max-det: no more than {inside.max_det} of an image come out of {network.path}")
    for name in sorted({"iou_thres", "agnostic_nms"} & given):
        console.warn(f"--{name.replace('_', '-')} has no effect: {network.path} has NMS inside")


def network_in_words(
    network: Network | ExportedNetwork, device: torch.device, size_hw: tuple[int, int]
) -> str:
    """Describe a network's device and size, for the first line of a run."""
    if isinstance(network, ExportedNetwork):
        return f"{describe_device(network.device)}: {network.in_words()}"
    return in_words(network, device, max(size_hw))
