"""Export to OpenVINO model folders."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO

from utils.config.files import refusals, replace_atomically, write_text_atomically
from utils.config.schema import yaml_text
from utils.inference.facts import ExportFacts, facts_to_dict


def write_openvino(folder: Path, onnx_content: bytes, facts: ExportFacts, half: bool) -> None:
    """Write `NAME.xml`, `NAME.bin` and `NAME.yaml`, converted from an ONNX file with float32 weights.

    half: store the weights in float16. Needs the package openvino.

    Raises:
        UserError: if the folder cannot be written.
    """
    import openvino

    stem = folder.name.removesuffix("_openvino_model")
    with tempfile.TemporaryDirectory() as scratch:
        onnx_file = Path(scratch) / f"{stem}.onnx"
        onnx_file.write_bytes(onnx_content)
        network = openvino.convert_model(onnx_file)
        if "conversion_parameters" in network.rt_info:
            del network.rt_info["conversion_parameters"]  # the path of the scratch file
        openvino.save_model(network, Path(scratch) / f"{stem}.xml", compress_to_fp16=half)
        with refusals("cannot be written", folder):
            folder.mkdir(exist_ok=True)
        for suffix in (".bin", ".xml"):
            _copy(Path(scratch) / f"{stem}{suffix}", folder / f"{stem}{suffix}")
    write_text_atomically(folder / f"{stem}.yaml", yaml_text(facts_to_dict(facts)))


def _copy(made: Path, target: Path) -> None:
    def write(stream: BinaryIO) -> None:
        with open(made, "rb") as source:
            shutil.copyfileobj(source, stream)

    replace_atomically(target, write)
