"""Inference of .onnx files with onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.config.files import read_regular, refusals
from utils.config.printable import printable
from utils.errors import UserError
from utils.inference.exported import ExportedNetwork, first_words
from utils.inference.facts import MAX_BATCH, Shape, facts_from_texts

MAX_BYTES = 2 << 30  # the limit of a protobuf message, which an .onnx file is
MAX_WEIGHT_BYTES = 8 << 30
_INSTALL = "pip install onnx onnxruntime"
_DOMAINS = frozenset(("", "ai.onnx", "com.microsoft"))
_REFUSED_OPS = frozenset(("EPContext",))  # refers to a file with a program for some accelerator


class OnnxNetwork(ExportedNetwork):
    """An .onnx file."""

    kind = "ONNX"

    def __init__(self, path: Path, device: torch.device) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError("needs onnxruntime", path, _INSTALL) from error
        content = checked_onnx(path)
        wanted = ["CPUExecutionProvider"]
        if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            wanted.insert(0, "CUDAExecutionProvider")
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4  # fatal only: errors are raised as exceptions
        settings.intra_op_num_threads = torch.get_num_threads()
        try:
            # Load the bytes that were checked; only a file with external weights must be opened by name.
            self.session = onnxruntime.InferenceSession(content or os.fspath(path), settings, wanted)
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise UserError(
                f"onnxruntime cannot load it ({first_words(error)})", path, "export it again"
            ) from error
        inputs = self.session.get_inputs()
        if (
            len(inputs) != 1
            or len(inputs[0].shape) != 4
            or inputs[0].type not in ("tensor(float)", "tensor(float16)")
        ):
            raise UserError("takes something else than one batch of images", path, "export it with export.py")
        self._input, self._type = inputs[0].name, np.float16 if "16" in inputs[0].type else np.float32
        self._output = self.session.get_outputs()[0].name
        facts = facts_from_texts(self.session.get_modelmeta().custom_metadata_map, _shape(inputs[0].shape))
        super().__init__(path, facts, device if len(wanted) > 1 else torch.device("cpu"))

    def run(self, images: Tensor) -> Tensor:
        """See `ExportedNetwork.run`."""
        given = {self._input: np.ascontiguousarray(images.cpu().numpy(), self._type)}
        try:
            (output,) = self.session.run([self._output], given)
        except Exception as error:
            raise UserError(
                f"onnxruntime cannot run it ({first_words(error)})",
                self.path,
                "export it anew with export.py",
            ) from error
        return torch.from_numpy(np.asarray(output)).to(self.device)


def checked_onnx(path: Path) -> bytes | None:
    """Check an .onnx file and return its content, None if it has external weights.

    Raises UserError if the file needs third-party operators (which come in libraries that would be executed),
    has weights outside of its folder, or is not an intact .onnx file.
    """
    try:
        import onnx
    except ImportError as error:
        raise UserError("needs onnx", path, _INSTALL) from error
    with refusals("cannot be read", path):
        content = read_regular(path, MAX_BYTES)
    try:
        model = onnx.ModelProto.FromString(content)
    except Exception as error:  # google.protobuf's DecodeError, or its C library's
        raise UserError("is not an intact ONNX file", path, "export it again") from error
    if not model.graph.node:
        raise UserError("is not an intact ONNX file (it has no graph)", path, "export it again")
    outside = False
    own = {(function.domain, function.name) for function in model.functions}
    for node in _nodes(model):
        if (node.domain, node.op_type) not in own and (
            node.domain not in _DOMAINS or node.op_type in _REFUSED_OPS
        ):
            what = printable(f"{node.domain}.{node.op_type}"[:100])
            raise UserError(f"refused: it needs the operator {what}", path, "export it with export.py")
        outside |= _check_tensors(_tensors_of(node), path, onnx.TensorProto.EXTERNAL)
    for graph in _graphs(model):
        outside |= _check_tensors(_initialisers(graph), path, onnx.TensorProto.EXTERNAL)
    return None if outside else content


def _graphs(model: Any) -> Iterator[Any]:
    """Yield the graph, and all subgraphs of its nodes and of its functions' nodes."""
    waiting = [model.graph]
    for function in model.functions:
        waiting.extend(_within(function.node))
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting.extend(_within(graph.node))


def _within(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            yield from attribute.graphs
            if attribute.HasField("g"):
                yield attribute.g


def _nodes(model: Any) -> Iterator[Any]:
    for function in model.functions:
        yield from function.node
    for graph in _graphs(model):
        yield from graph.node


def _tensors_of(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        yield attribute.t
        yield from attribute.tensors
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)


def _initialisers(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)


def _check_tensors(tensors: Iterable[Any], path: Path, external: int) -> bool:
    """Return whether any tensor is external. Raises UserError if its file is not in the same folder."""
    outside = False
    for tensor in tensors:
        if tensor.data_location != external and not tensor.external_data:
            continue
        outside = True
        places = [entry.value for entry in tensor.external_data if entry.key == "location"]
        name = places[0] if len(places) == 1 else ""
        beside = path.parent / name
        if not name or Path(name).name != name or "\\" in name or beside.is_symlink() or not beside.is_file():
            shown = printable(name[:100])
            raise UserError(
                f"refused: its weights lie in {shown!r}, which is not a file beside it",
                path,
                "put that file into the same folder, or export it again",
            )
        if beside.stat().st_size > MAX_WEIGHT_BYTES:
            what = f"has more than {MAX_WEIGHT_BYTES >> 30} GiB"
            raise UserError(what, beside, "no YOLO network is that large: export it again")
    return outside


def _shape(sides: list[Any]) -> Shape:
    batch, _, height, width = (side if isinstance(side, int) and side > 0 else None for side in sides)
    return batch if batch is None or batch <= MAX_BATCH else None, height, width
