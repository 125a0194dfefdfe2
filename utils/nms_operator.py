"""torchvision's NMS operator, without the rest of torchvision.

`import torchvision` takes nearly as long as `import torch`: its models import torch's compiler. The scripts
need one operator, which is in the package's library.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

__all__ = ["nms"]


def nms(boxes_xyxy: Tensor, confidence: Tensor, iou_thres: float) -> Tensor:
    """Return the indices of the boxes (n, 4) that NMS keeps, most confident first.

    confidence: (n,), of the dtype of the boxes. Same as `torchvision.ops.nms`.
    """
    return cast(Tensor, torch.ops.torchvision.nms(boxes_xyxy, confidence, iou_thres))


def _load_operator() -> None:
    """Register torchvision's operators with torch.

    Raises:
        ImportError: if torchvision is missing (ModuleNotFoundError) or does not match torch.
    """
    if _is_registered():
        return  # torchvision has been imported
    spec = importlib.util.find_spec("torchvision")
    folders = [] if spec is None else spec.submodule_search_locations or []
    for library in (file for folder in folders for file in sorted(Path(folder).glob("_C*"))):
        if library.name.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)):
            with contextlib.suppress(OSError):
                torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    if _is_registered():
        return
    try:
        importlib.import_module("torchvision")  # may have its library elsewhere
    except RuntimeError as error:
        raise ImportError("does not match torch", name="torchvision") from error
    if not _is_registered():
        raise ImportError("does not match torch", name="torchvision")


def _is_registered() -> bool:
    return hasattr(torch.ops.torchvision, "nms")


_load_operator()
