"""Steps whose loss or gradient is no finite number: skipped, counted, and the end of a run when many."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.batch import Batch, Progress
from utils.config.files import replace_atomically
from utils.errors import UserError

MANY = 10  # updates in a row; a loss scaler needs fewer to find its scale
INTERVAL = 10  # steps between two looks at a GPU, each of which waits for it


class StepGuard:
    """Watches the gradient norms of a run.

    The update itself is skipped by the loss scaler, on the device. What the guard adds: it counts, it
    puts the statistics of batch norms back that a broken batch has spoilt, and it stops a run that does
    not recover, with the batch on the disk.
    """

    def __init__(self, modules: list[nn.Module], folder: Path | None = None, interval: int = 1) -> None:
        """`modules` are those whose buffers are watched over, the network and its average.

        folder: where a batch is saved. interval: steps between two looks at the device.
        """
        self.folder, self.interval = folder, interval
        self.skipped = 0
        self._counts: Tensor | None = None  # of this run: skipped, and skipped in a row
        self._watched = [b for module in modules for b in module.buffers() if b.is_floating_point()]
        self._good = [value.detach().clone() for value in self._watched]
        self._alert = False

    def note(self, norm: Tensor) -> None:
        """Takes in the norm of all gradients of an update; does not wait for the device."""
        if self._counts is None:
            self._counts = torch.zeros(2, device=norm.device)
        bad = (~norm.isfinite()).float()
        self._counts = (self._counts + bad) * torch.stack((torch.ones_like(bad), bad))

    def check(self, batch: Batch, progress: Progress, terms: Mapping[str, Tensor]) -> str | None:
        """Looks at the counts now and then; gives a warning where an update was skipped since.

        Raises UserError when too many were skipped in a row.
        """
        if self._counts is None or not (self._alert or progress.step % self.interval == 0):
            return None
        skipped, in_row = (int(value) for value in self._counts.tolist())
        new, self.skipped = skipped - self.skipped, skipped
        if not new:
            self._alert = False
            self.remember()
            return None
        self._alert = True
        self._put_back()
        place = f"epoch {progress.epoch + 1}, step {progress.step}"
        if in_row >= MANY:
            saved = self._save(batch, progress, terms)
            raise UserError(
                f"{in_row} updates in a row had a loss or gradient that is no finite number{saved}",
                place,
                "lower lr0 or --distill-ratio, look at the labels, or try --no-amp; the last checkpoint "
                "is intact",
            )
        return f"{place}: loss or gradient is no finite number, update skipped ({skipped} so far)"

    @torch.no_grad()
    def remember(self) -> None:
        """Takes the buffers as they are for good ones, as after a state was restored."""
        for good, value in zip(self._good, self._watched, strict=True):
            good.copy_(value)

    @torch.no_grad()
    def _put_back(self) -> None:
        """A broken batch leaves NaN in running means, which no later batch can average away."""
        for value, good in zip(self._watched, self._good, strict=True):
            if not bool(value.isfinite().all()):
                value.copy_(good)

    def _save(self, batch: Batch, progress: Progress, terms: Mapping[str, Tensor]) -> str:
        if self.folder is None:
            return ""
        path = self.folder / "bad_batch.pt"
        content: dict[str, Any] = {
            "images": batch.images.detach().cpu(),
            "targets": batch.targets.detach().cpu(),
            "labelled": batch.labelled.cpu(),
            "paths": list(batch.paths),
            "epoch": progress.epoch,
            "step": progress.step,
            "terms": {name: float(value.detach()) for name, value in terms.items()},
        }
        replace_atomically(path, lambda stream: torch.save(content, stream))
        return f" (the last batch is in {path})"
