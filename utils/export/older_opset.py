"""Conversion of ONNX networks to opsets older than those that the exporter writes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from utils.errors import UsageError, reason_of
from utils.inference.facts import ExportFacts

OLDEST, WRITTEN = 12, 18
_CONVERTED = 14  # onnx itself converts no further: it has no way back for Mul, Shape, ...


def to_older_opset(proto: Any, opset: int, facts: ExportFacts, simplify: bool) -> Any:
    """Return an ONNX model of opset 18 as one of an older opset, with the oldest IR version that has it.

    Whether it computes the same is for the comparison with PyTorch to say. Raises UsageError if an operator
    cannot be expressed; `facts` and `simplify` are the options that decide which there are.
    """
    try:
        return _converted(proto, opset)
    except _refusals() as error:
        reason = reason_of(error).rpartition("failed: ")[2]
        fix = _advice(_oldest_possible(proto, opset), facts, simplify)
        raise UsageError(f"this network cannot be converted to {opset} ({reason})", "--opset", fix) from error


def _converted(proto: Any, opset: int) -> Any:
    from onnx import checker, helper, version_converter

    older = version_converter.convert_version(proto, max(opset, _CONVERTED))
    if opset < _CONVERTED:
        _relabel(older, opset)
    older.ir_version = helper.find_min_ir_version_for(older.opset_import)
    checker.check_model(older, full_check=True)
    return older


def _refusals() -> tuple[type[Exception], ...]:
    """Return what a failed conversion raises."""
    from onnx import checker, shape_inference, version_converter

    invalid = (checker.ValidationError, shape_inference.InferenceError)
    return (RuntimeError, version_converter.ConvertError, *invalid)


def _oldest_possible(proto: Any, refused: int) -> int:
    """Return the oldest opset above a refused one that the model can be converted to."""
    for opset in range(refused + 1, WRITTEN):
        with suppress(*_refusals()):
            _converted(proto, opset)
            return opset
    return WRITTEN


def _relabel(proto: Any, opset: int) -> None:
    """Turn opset 14 into 13 or 12 in place.

    Most operators differ in the types that they take only. The checker finds attributes and inputs that the
    older opset lacks; these two have the same meaning without or with them.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = proto.graph
    shapes = {value.name: value for value in graph.initializer}
    for node in graph.node:
        if node.op_type == "Reshape" and node.input[1] in shapes:
            if numpy_helper.to_array(shapes[node.input[1]]).all():  # no zero that `allowzero` could mean
                kept = [attribute for attribute in node.attribute if attribute.name != "allowzero"]
                del node.attribute[:]
                node.attribute.extend(kept)
        if node.op_type == "Resize" and opset < 13 and not node.input[1]:
            node.input[1] = "no_region"  # used by one mode only, but required
    if any("no_region" in node.input for node in graph.node):
        graph.initializer.append(helper.make_tensor("no_region", TensorProto.FLOAT, [0], []))
    next(one for one in proto.opset_import if one.domain in ("", "ai.onnx")).version = opset


def _advice(oldest: int, facts: ExportFacts, simplify: bool) -> str:
    """Return what to do: opsets from the oldest possible one work, older ones for a network's plain form."""
    used = [
        *(["--dynamic"] if facts.size_hw is None else []),
        *(["--nms"] if facts.nms is not None else []),
        *([] if simplify else ["--no-simplify"]),
    ]
    return f"give {oldest} or newer" + (f", or leave out {' and '.join(used)}" if used else "")
