"""Inference of OpenVINO networks: folders with an .xml, a .bin and a .yaml file."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import yaml
from torch import Tensor

from utils.config.files import read_regular, refusals
from utils.config.schema import parse_yaml, read_text
from utils.errors import UserError
from utils.inference.exported import ExportedNetwork, last_words
from utils.inference.facts import MAX_BATCH, Shape, facts_from_dict

MAX_XML_BYTES, MAX_BIN_BYTES = 64 << 20, 4 << 30
_ENTITIES = re.compile(r"<!\s*(doctype|entity)", re.IGNORECASE)
_ENCODING = re.compile(r"<\?xml[^>]*?\bencoding\s*=\s*[\"']([^\"']*)", re.IGNORECASE)
_START = re.compile(r"\s*(<\?xml\b[^>]*>)?\s*<net\b")
_ENCODINGS = frozenset(("utf-8", "utf8", "us-ascii", "ascii"))


class OpenVinoNetwork(ExportedNetwork):
    """A folder written by `export.py --include openvino` or by YOLOv5's own export."""

    kind = "OpenVINO"

    def __init__(self, folder: Path) -> None:
        try:
            import openvino
        except ImportError as error:
            raise UserError("needs openvino", folder, "pip install openvino") from error
        network = _only(folder, ".xml")
        # Pass openvino the bytes that were checked: if it opened the file by name, that might have changed.
        text = _checked_xml(_read(network, MAX_XML_BYTES), network)
        weights = _read(network.with_suffix(".bin"), MAX_BIN_BYTES)
        try:
            core = openvino.Core()
            model = core.read_model(text, weights)
            # By default it computes in bfloat16 on CPUs that support it, and scores would be off by .06.
            self.compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            (taken,) = model.inputs
            shape = _shape([side.get_length() if side.is_static else None for side in taken.partial_shape])
        except (RuntimeError, ValueError) as error:
            what = f"openvino cannot load it ({last_words(error)})"
            raise UserError(what, network, "export it again") from error
        stated = None
        for path in (folder / f"{network.stem}.yaml", folder / "metadata.yaml"):
            if path.is_file():
                _, stated = parse_yaml(read_text(path), path, yaml.SafeLoader)
                break
        facts = facts_from_dict(stated if isinstance(stated, dict) else {}, shape)
        super().__init__(folder, facts, torch.device("cpu"))

    def run(self, images: Tensor) -> Tensor:
        """See `ExportedNetwork.run`."""
        try:
            output = self.compiled([images.numpy()])[0]
        except RuntimeError as error:
            what = f"does not run at {tuple(images.shape)} ({last_words(error)})"
            raise UserError(
                what, self.path, "export it again, or give the --imgsz that it was exported for"
            ) from error
        return torch.from_numpy(output.copy())


def _read(path: Path, most: int) -> bytes:
    with refusals("cannot be read", path):
        return read_regular(path, most)


def _checked_xml(content: bytes, path: Path) -> bytes:
    """Return the content. Raises UserError if it is not a network's XML, or defines or may hide entities."""
    fix = "export it again"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("refused: its text is not UTF-8", path, fix) from error
    stated = _ENCODING.match(text.lstrip())
    # UTF-16 and UTF-32 without a byte order mark decode as UTF-8 with NUL characters.
    if "\0" in text or (stated and stated[1].strip().lower() not in _ENCODINGS):
        raise UserError("refused: its text is not UTF-8", path, fix)
    if _ENTITIES.search(text):
        raise UserError("refused: it defines entities", path, fix)
    # openvino accepts bytes in any format it knows, and an ONNX network may refer to other files.
    if not _START.match(text):
        raise UserError("refused: it is not an OpenVINO network", path, fix)
    return content


def _only(folder: Path, suffix: str) -> Path:
    found = sorted(folder.glob(f"*{suffix}"))
    if len(found) != 1:
        raise UserError(f"holds {len(found)} {suffix} files", folder, "it must be one network's folder")
    return found[0]


def _shape(sides: list[int | None]) -> Shape:
    if len(sides) != 4:
        raise ValueError("it takes something else than a batch of images")
    batch, _, height, width = sides
    return batch if batch is None or batch <= MAX_BATCH else None, height, width
