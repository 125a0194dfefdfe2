"""Inference of .torchscript files with PyTorch's own interpreter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import utils.nms_operator  # noqa: F401 - files with NMS inside call its operator
from models.torchscript import read_torchscript
from utils.errors import UserError
from utils.inference.exported import ExportedNetwork, first_words, last_words
from utils.inference.facts import facts_from_dict, plain_from_text

CONFIG = "config.txt"


class TorchScriptNetwork(ExportedNetwork):
    """A .torchscript file."""

    kind = "TorchScript"

    def __init__(self, path: Path, device: torch.device) -> None:
        archive, texts = read_torchscript(path)
        try:
            with warnings.catch_warnings():
                # PyTorch recommends torch.export, but no other programs read its files yet.
                warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
                module: Any = torch.jit.load(archive, map_location=device)  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError, AttributeError) as error:
            what = f"PyTorch cannot load it ({first_words(error)})"
            raise UserError(what, path, "export it again") from error
        self.module = module.eval()
        weights = next((p for p in self.module.parameters() if p.is_floating_point()), None)
        self.dtype = torch.float32 if weights is None else weights.dtype
        stated = plain_from_text(texts.get(CONFIG, ""))
        super().__init__(path, facts_from_dict(stated if isinstance(stated, dict) else {}), device)

    @torch.no_grad()
    def run(self, images: Tensor) -> Tensor:
        """See `ExportedNetwork.run`."""
        try:
            output = self.module(images.to(self.dtype))
        except (RuntimeError, ValueError) as error:
            what = f"does not run at {tuple(images.shape)} ({last_words(error)})"
            raise UserError(
                what, self.path, "export it again, or give the --imgsz that it was exported for"
            ) from error
        while isinstance(output, list | tuple) and output:
            output = output[0]
        if not isinstance(output, Tensor):
            what = f"gives a {type(output).__name__} and no tensor"
            raise UserError(what, self.path, "export a detector, as export.py does")
        return output
