"""Export to .onnx files."""

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
from utils.export.older_opset import OLDEST, WRITTEN, to_older_opset
from utils.export.onnx_nms import select_with, translations
from utils.inference.facts import MAX_BATCH, ExportFacts, facts_to_texts

INPUT, OUTPUT = "images", "output0"


def onnx_content(model: Model, facts: ExportFacts, opset: int, simplify: bool) -> bytes:
    """Return an .onnx file that maps images (B, 3, H, W) in the model's precision to float32 `output0`.

    model: fused, in eval mode. Dimensions of `facts.shape` that are None are dynamic. Needs the packages
    onnx and onnxscript. Raises UsageError if onnx does not support `opset`, or not for this network.
    """
    _check_opset(opset)
    example, shapes = _example(model, facts)
    network = ExportNetwork(model, None if facts.nms is None else select_with(facts.nms)).eval()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet_logs():
        # The exporter's warnings about its internals are nothing that the user could fix.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (example,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=max(opset, WRITTEN),
            dynamo=True,
            external_data=False,
            dynamic_shapes=shapes,
            optimize=simplify,
            verbose=False,
            custom_translation_table=translations() if facts.nms is not None else None,
        )
    assert program is not None
    proto = program.model_proto
    return _finished(proto if opset >= WRITTEN else to_older_opset(proto, opset, facts, simplify), facts)


def _check_opset(opset: int) -> None:
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        what = f"{opset} is newer than what the package onnx knows"
        raise UsageError(what, "--opset", f"{OLDEST} to {newest}")


def _example(model: Model, facts: ExportFacts) -> tuple[Tensor, Any]:
    """Return example images for the exporter, and the specification of their dynamic dimensions."""
    weights = model.head.m[0].weight
    assert isinstance(weights, Tensor)
    batch, height, width = facts.shape
    multiple = model.size_multiple
    if batch is not None and height is not None and width is not None:
        return torch.zeros(batch, model.channels, height, width).to(weights), None
    # All dimensions different and none 1, else the exporter would specialise them to constants.
    example = torch.zeros(2, model.channels, 4 * multiple, 3 * multiple).to(weights)
    dim, most = torch.export.Dim, MAX_SIDE // multiple
    rows, columns = dim("rows", min=1, max=most), dim("columns", min=1, max=most)
    return example, ({0: dim("batch", min=1, max=MAX_BATCH), 2: multiple * rows, 3: multiple * columns},)


def _finished(proto: Any, facts: ExportFacts) -> bytes:
    """Serialise the model with its metadata, without file paths and line numbers of the exporting code."""
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
    """Set the exporter's loggers to errors only within the block."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
