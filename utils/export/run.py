"""The work of export.py: export a network for other runtimes, and verify the files against PyTorch."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import torch

from models.checkpoint import build_model, read_checkpoint
from models.places import resolve_weights
from models.yolo import Model
from utils.config.cli import import_at_once
from utils.config.command import command
from utils.config.files import refusals, replace_atomically, sync_folder
from utils.config.options import DetectOptions, ExportOptions
from utils.datasets.images import Image
from utils.device import advice_on_memory, select_device
from utils.errors import UserError
from utils.export.onnx_file import onnx_content
from utils.export.openvino_folder import write_openvino
from utils.export.torchscript_file import torchscript_content
from utils.export.verify import EXACT, HALF, Comparison, Tolerance, check_images, compare, describe
from utils.inference.backends import ONNX, OPENVINO_FOLDER, TORCHSCRIPT, is_exported, load_network
from utils.inference.exported import ExportedNetwork
from utils.inference.facts import ExportFacts, NmsInside
from utils.inference.predictor import halved, in_words
from utils.inference.preprocess import fitting_image_size
from utils.inference.sources import open_source, resolve_default_source
from utils.reporting.console import Console
from utils.words import counted

_SCRATCH, _ABANDONED_SECONDS = ".export-", 24 * 3600
_FEW = 5  # so few predictions or detections show little
# Packages beyond requirements.txt for writing a format and running it for the comparison.
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_PACKAGES = {"torchscript": (), "onnx": _ONNX_PACKAGES, "openvino": (*_ONNX_PACKAGES[:2], "openvino")}
_ALWAYS_SAID = frozenset({"weights", "source"})


@advice_on_memory()
def run_export(options: ExportOptions, console: Console | None = None) -> list[Path]:
    """Write the formats of `options.include` beside the weights and return their paths.

    Raises UserError if one cannot be written, or its outputs differ from the network's: a previous file is
    then left unchanged, and the other formats are written all the same.
    """
    console = console or Console()
    _load_packages(options.include)
    device = select_device(options.device)
    weights = resolve_weights(options.weights, options.fetches)
    if is_exported(weights):
        raise UserError("is an exported file already", weights, "give the .pt file that it was made of")
    model = build_model(read_checkpoint(weights)).fuse().eval().requires_grad_(False)
    model.check_takes_colour(weights)
    images = _images(options.source, console)
    sides = fitting_image_size(options.imgsz, model.size_multiple, console)
    size_hw = sides[0], sides[-1]
    console.info(f"{weights} on {in_words(model, torch.device('cpu'), max(size_hw))}")
    makers = _Makers(options, model, _facts(options, model, size_hw), device)
    check = _Check(model, images, size_hw, HALF if options.half else EXACT)
    written: list[Path] = []
    failures: dict[str, UserError] = {}
    # A failure does not affect the others: each is in place before the next one is started.
    for name in sorted(set(options.include), key=("torchscript", "onnx", "openvino").index):
        try:
            written.append(_export(makers, name, weights, check, console))
        except UserError as error:
            failures[str(error)] = error
    for path in written:
        values = {"weights": str(path), "source": options.source, "imgsz": options.imgsz}
        console.info(f"use it: {command(DetectOptions, values, _ALWAYS_SAID)}")
    if failures:
        *others, last = failures.values()
        for other in others:
            console.warn(str(other))
        raise last
    return written


@dataclass(frozen=True)
class _Check:
    """The reference for exported files: the model, float32 on the CPU, on images at a size."""

    model: Model
    images: Sequence[Image]
    size_hw: tuple[int, int]
    allowed: Tolerance

    def __call__(self, path: Path, device: torch.device) -> Comparison:
        """Compare a file with the model; raises UserError if they differ too much."""
        network = load_network(path, device)
        assert isinstance(network, ExportedNetwork)
        return compare(self.model, network, self.images, self.size_hw, self.allowed)


def _export(makers: _Makers, name: str, weights: Path, check: _Check, console: Console) -> Path:
    """Export one format and return its path, to which it is moved only once it is verified.

    Raises UserError if it cannot be written or fails verification; a previous file is then left unchanged.
    """
    folder = weights.parent
    with refusals("nothing can be written here", folder):
        _remove_abandoned(folder)
        scratch = tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder)
    with scratch:
        try:
            made = makers.make(name, Path(scratch.name), weights.stem)
            path = folder / made.name
            console.info(f"{path}: {_megabytes(made):.1f} MB, comparing it with PyTorch")
            result = check(made, makers.device)
        except UserError as error:
            if not Path(error.where).is_relative_to(scratch.name):
                raise
            # The temporary file will be gone by the time this is read: name the intended path instead.
            wanted = folder / Path(error.where).relative_to(scratch.name)
            raise UserError(error.what, wanted, error.fix) from error
        _put_in_place(made, path)
    seen = result.predictions + result.detections
    if seen:
        console.info(describe(result, path))
    if seen < _FEW:
        fix = "name images in which it sees something with --source"
        what, much = (f"only {counted(seen, 'object')}", "little") if seen else ("nothing", "nothing")
        console.warn(f"{path}: the network sees {what} in these images, so {much} was compared; {fix}")
    return path


def _remove_abandoned(folder: Path) -> None:
    """Remove the leftovers of killed exports, by their age, as another export may be running."""
    for place in folder.glob(f"{_SCRATCH}*"):
        if place.is_dir() and time.time() - place.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(place, ignore_errors=True)


def _put_in_place(made: Path, path: Path) -> None:
    """Move a file, or the files in a folder, to their place, replacing previous ones."""
    with refusals("cannot be written", path):
        if made.is_dir():
            path.mkdir(exist_ok=True)
            for file in sorted(made.iterdir()):
                os.replace(file, path / file.name)
            sync_folder(path)
        else:
            os.replace(made, path)
        sync_folder(path.parent)


def _load_packages(include: Sequence[str]) -> None:
    """Import what the exporters import, before anything is written: Ctrl-C may end the process at once.

    Raises UserError if packages are missing.
    """
    needed = dict.fromkeys(package for name in include for package in _PACKAGES[name])
    missing = [package for package in needed if not is_installed(package)]
    if missing:
        raise UserError(f"needs {', '.join(missing)}", "--include", f"pip install {' '.join(missing)}")
    if "onnxscript" in needed:
        for name in ("torch._dynamo", "onnxscript"):
            import_at_once(name)


def is_installed(package: str) -> bool:
    """Return whether Python finds a package."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # ValueError: in sys.modules without a spec
        return False


def _images(source: str, console: Console) -> Sequence[Image]:
    frames = islice(open_source(resolve_default_source(source), warn=console.warn), 4)
    return check_images([frame.image for frame in frames], source)


def _facts(options: ExportOptions, model: Model, size_hw: tuple[int, int]) -> ExportFacts:
    nms = NmsInside(
        conf_thres=options.conf_thres,
        iou_thres=options.iou_thres,
        max_det=options.max_det,
        agnostic=options.agnostic_nms,
    )
    return ExportFacts(
        names=tuple(model.names),
        stride=model.size_multiple,
        shape=(None, None, None) if options.dynamic else (options.batch_size, *size_hw),
        nms=nms if options.nms else None,
    )


class _Makers:
    """Creates the formats from one network on a device."""

    def __init__(
        self, options: ExportOptions, model: Model, facts: ExportFacts, device: torch.device
    ) -> None:
        self.options, self.model, self.facts, self.device = options, model, facts, device

    def make(self, name: str, folder: Path, stem: str) -> Path:
        """Write the named format into a folder and return the path of its file or subfolder."""
        if name == "openvino":
            made = folder / f"{stem}{OPENVINO_FOLDER}"
            # Its input is float32, whatever the precision of its weights.
            content = self.onnx if not self.options.half else self._onnx(self._placed(half=False))
            write_openvino(made, content, self.facts, self.options.half)
            return made
        if name == "onnx":
            return _written(folder / f"{stem}{ONNX}", self.onnx)
        content = torchscript_content(self._placed(self.options.half), self.facts)
        return _written(folder / f"{stem}{TORCHSCRIPT}", content)

    @cached_property
    def onnx(self) -> bytes:
        """The content of the .onnx file, from which OpenVINO is converted too."""
        return self._onnx(self._placed(self.options.half))

    def _onnx(self, model: Model) -> bytes:
        return onnx_content(model, self.facts, self.options.opset, self.options.simplify)

    def _placed(self, half: bool) -> Model:
        """Return a copy of the model on the device, in the given precision."""
        model = copy.deepcopy(self.model).to(self.device)
        return halved(model) if half else model


def _written(path: Path, content: bytes) -> Path:
    def write(stream: BinaryIO) -> None:
        stream.write(content)

    replace_atomically(path, write)
    return path


def _megabytes(path: Path) -> float:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files) / 1e6
