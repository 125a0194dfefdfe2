"""The metadata of exported networks, as written into the files and read back.

The keys `stride` and `names` are those of YOLOv5's own exports, and so are their locations: the metadata of
an .onnx file, `config.txt` within a .torchscript file, a YAML beside an OpenVINO network.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from models.checkpoint import MAX_NAME
from models.config import MAX_CLASSES
from utils.config.options_base import MAX_SIDE
from utils.config.version import VERSION

DEFAULT_STRIDE = 32
MAX_BATCH = 4096
_MAX_LETTERS = 4 << 20
Shape = tuple[int | None, int | None, int | None]


@dataclass(frozen=True, kw_only=True)
class NmsInside:
    """The parameters of NMS that is part of an exported file; the thresholds are those of `NmsRules`."""

    conf_thres: float
    iou_thres: float
    max_det: int
    agnostic: bool = False


@dataclass(frozen=True, kw_only=True)
class ExportFacts:
    """The metadata of an exported network.

    names: of the classes, empty if the file has none. stride: image sides must be multiples of it, in px.
    shape: (batch, height, width) of the input, None for each dynamic dimension. knows_shape: whether the
    shape is known at all. nms: None if the output is all predictions.
    """

    names: tuple[str, ...] = ()
    stride: int = DEFAULT_STRIDE
    shape: Shape = (None, None, None)
    nms: NmsInside | None = None
    knows_shape: bool = True

    @property
    def size_hw(self) -> tuple[int, int] | None:
        """The fixed height and width of the input, None if they are dynamic."""
        _, height, width = self.shape
        return None if height is None or width is None else (height, width)


def facts_to_dict(facts: ExportFacts) -> dict[str, Any]:
    """Return the facts as plain values under the files' keys; `names` as a dict by class index."""
    nms = facts.nms
    return {
        "description": "YOLOv5 detection network",
        "software": f"yolov5-distillation {VERSION}",
        "stride": facts.stride,
        "names": dict(enumerate(facts.names)),
        "shape": [facts.shape[0], 3, facts.shape[1], facts.shape[2]],
        "nms": None if nms is None else dict(vars(nms)),
    }


def facts_from_dict(data: Mapping[str, Any], shape: Shape | None = None) -> ExportFacts:
    """Return the facts that a file states, with defaults for invalid values.

    shape: the input shape of the network itself, if the format reveals it; overrides what is stated.
    """
    stride = data.get("stride")
    stated = data.get("shape")
    if shape is None and isinstance(stated, list) and len(stated) == 4:
        shape = _side(stated[0], MAX_BATCH), _side(stated[2], MAX_SIDE), _side(stated[3], MAX_SIDE)
    return ExportFacts(
        names=_names(data.get("names")),
        stride=stride if _is_whole(stride) and 1 <= stride <= 1024 else DEFAULT_STRIDE,
        shape=shape or (None, None, None),
        nms=_nms(data.get("nms")),
        knows_shape=shape is not None,
    )


def facts_to_texts(facts: ExportFacts) -> dict[str, str]:
    """Return the facts as strings by key, as the metadata of an .onnx file requires."""
    return {
        key: value if isinstance(value, str) else repr(value) for key, value in facts_to_dict(facts).items()
    }


def facts_from_texts(texts: Mapping[str, str], shape: Shape | None = None) -> ExportFacts:
    """Return the facts in strings written by `facts_to_texts` or by YOLOv5's own export."""
    return facts_from_dict({key: plain_from_text(value) for key, value in texts.items()}, shape)


def plain_from_text(text: str) -> Any:
    """Parse a Python literal or JSON, without evaluating anything; returns None if the text is neither."""
    if len(text) > _MAX_LETTERS:
        return None
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _names(value: Any) -> tuple[str, ...]:
    """Return class names from a list, or from a dict by index (JSON turns integer keys into strings)."""
    if isinstance(value, dict):
        if len(value) > MAX_CLASSES:
            return ()
        value = [value.get(number, value.get(str(number), "")) for number in range(len(value))]
    if not isinstance(value, list) or len(value) > MAX_CLASSES:
        return ()
    return tuple(_name(name) for name in value)


def _name(value: Any) -> str:
    try:
        return str(value)[:MAX_NAME] if isinstance(value, str | int | float) else ""
    except ValueError:  # an int of thousands of digits
        return ""


def _nms(value: Any) -> NmsInside | None:
    if not isinstance(value, dict):
        return None
    conf, iou, most = (value.get(key) for key in ("conf_thres", "iou_thres", "max_det"))
    if not (_is_part(conf) and _is_part(iou) and _is_whole(most) and most > 0):
        return None
    return NmsInside(
        conf_thres=float(conf), iou_thres=float(iou), max_det=most, agnostic=value.get("agnostic") is True
    )


def _side(value: Any, most: int) -> int | None:
    return value if _is_whole(value) and 0 < value <= most else None


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_part(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
