"""Writes .onnx files."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import Any

import torch
from torch import Tensor

from models.yolo import Model
from utils.config.options_base import MAX_SIDE
from utils.errors import UsageError
from utils.export.network import ExportNetwork
from utils.export.onnx_nms import select_with, translations
from utils.inference.facts import MAX_BATCH, ExportFacts, facts_to_texts

INPUT, OUTPUT = "images", "output0"


def onnx_content(model: Model, facts: ExportFacts, opset: int, simplify: bool) -> bytes:
    """The bytes of an .onnx file: images (B, 3, H, W) of the model's own precision to `output0`, float32.

    model: fused, in evaluation mode. Where sides of `facts.shape` are None they are free. Needs the packages
    onnx and onnxscript. Raises UsageError for an `opset` that is not known.
    """
    _check_opset(opset)
    example, shapes = _example(model, facts)
    network = ExportNetwork(model, None if facts.nms is None else select_with(facts.nms)).eval()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet_logs():
        # What the exporter says of its own inner ways is nothing that the user could mend.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (example,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=opset,
            dynamo=True,
            external_data=False,
            dynamic_shapes=shapes,
            optimize=simplify,
            verbose=False,
            custom_translation_table=translations() if facts.nms is not None else None,
        )
    assert program is not None
    return _finished(program.model_proto, facts)


def _check_opset(opset: int) -> None:
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise UsageError(f"{opset} is newer than what the package onnx knows", "--opset", f"18 to {newest}")


def _example(model: Model, facts: ExportFacts) -> tuple[Tensor, Any]:
    """Images to follow, and which of their sides are free."""
    weights = model.head.m[0].weight
    assert isinstance(weights, Tensor)
    batch, height, width = facts.shape
    multiple = model.size_multiple
    if batch is not None and height is not None and width is not None:
        return torch.zeros(batch, model.channels, height, width).to(weights), None
    # No two sides alike, and none 1: the exporter takes those for constants.
    example = torch.zeros(2, model.channels, 4 * multiple, 3 * multiple).to(weights)
    dim, most = torch.export.Dim, MAX_SIDE // multiple
    rows, columns = dim("rows", min=1, max=most), dim("columns", min=1, max=most)
    return example, ({0: dim("batch", min=1, max=MAX_BATCH), 2: multiple * rows, 3: multiple * columns},)


def _finished(proto: Any, facts: ExportFacts) -> bytes:
    """The file with its metadata, without the paths and lines of the code that it was made from."""
    for key, text in facts_to_texts(facts).items():
        proto.metadata_props.add(key=key, value=text)
    graph = proto.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    (taken,), (given,) = graph.input, graph.output
    names = ("batch", "", "height", "width")
    for side, name in zip(taken.type.tensor_type.shape.dim, names, strict=True):
        if side.dim_param:
            side.dim_param = name
    for side, name in zip(given.type.tensor_type.shape.dim, ("batch", "predictions", ""), strict=True):
        if side.dim_param:
            side.dim_param = name
    content: bytes = proto.SerializeToString()
    return content


@contextlib.contextmanager
def _quiet_logs() -> Any:
    """Silences the exporter's loggers below errors."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
