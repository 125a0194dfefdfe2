"""torchvision's NMS operator, without the rest of torchvision.

`import torchvision` takes nearly as long as `import torch`: its models import torch's compiler. The scripts
need one operator, which is in the package's library.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from utils.errors import reason_of

__all__ = ["nms"]


def nms(boxes_xyxy: Tensor, confidence: Tensor, iou_thres: float) -> Tensor:
    """Return the indices of the boxes (n, 4) that NMS keeps, most confident first.

    confidence: (n,). Same as `torchvision.ops.nms`, in float32 if given less, autocast or not.
    """
    if boxes_xyxy.dtype in (torch.float16, torch.bfloat16):
        boxes_xyxy = boxes_xyxy.float()
    confidence = confidence.to(boxes_xyxy.dtype)
    return cast(Tensor, torch.ops.torchvision.nms(boxes_xyxy, confidence, iou_thres))


def _load_operator() -> None:
    """Register torchvision's operators with torch, unless they are.

    Raises:
        ImportError: if torchvision is missing (ModuleNotFoundError), or cannot be loaded into this torch.
    """
    if _is_registered():  # a second time would end the process
        return
    reason = "it has no NMS operator"
    for library in _libraries():
        try:
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
        except OSError as error:
            reason = reason_of(error.__cause__ or error)  # torch tells only the path
        if _is_registered():
            _check_cuda()
            return
    try:
        importlib.import_module("torchvision")  # may have its library elsewhere
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise _mismatch(reason) from error
    if not _is_registered():
        raise _mismatch(reason)


def _libraries() -> Iterator[Path]:
    """Yield the files of the package that may be the library of its operators."""
    try:
        spec = importlib.util.find_spec("torchvision")
    except ValueError:  # a module that somebody else has put in its place
        return
    for folder in () if spec is None else spec.submodule_search_locations or ():
        for file in sorted(Path(folder).glob("_C*")):
            if file.name.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)):
                yield file


def _check_cuda() -> None:
    """Raise ImportError if torch and torchvision were built for different major versions of CUDA."""
    theirs, ours = str(torch.ops.torchvision._cuda_version()), torch.version.cuda
    if ours is not None and theirs != "-1" and theirs[:-3] != ours.partition(".")[0]:
        raise _mismatch(f"it was built for CUDA {theirs[:-3]}")


def _mismatch(reason: str) -> ImportError:
    version = torch.__version__
    return ImportError(f"torchvision cannot be loaded into torch {version} ({reason})", name="torchvision")


def _is_registered() -> bool:
    return hasattr(torch.ops.torchvision, "nms")


_load_operator()
