"""Steps with a non-finite loss or gradient: skipped, counted, and the end of a run if there are many."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.batch import Batch, Progress
from utils.config.files import replace_atomically
from utils.distributed import rank
from utils.errors import UserError
from utils.training.delayed_read import DelayedRead

MAX_CONSECUTIVE_SKIPS = 10  # skipped updates in a row; a loss scaler needs fewer to find its scale
INTERVAL = 10  # steps between two checks on a GPU; each reads what the one before has requested


class DivergedError(UserError):
    """A run that does not recover from non-finite losses or gradients."""


class StepGuard:
    """Watches the gradient norms of a run.

    The update itself is skipped by the loss scaler, on the device. The guard counts skipped updates; after
    every step it restores batch norm statistics corrupted by a bad batch, also on the device; and it stops a
    run that does not recover, saving the batch to disk.
    """

    def __init__(self, modules: list[nn.Module], folder: Path | None = None, interval: int = 1) -> None:
        """`modules` are those whose buffers are watched, the network and its EMA.

        folder: where each rank saves its batch, as any rank may have the bad one. interval: steps between two
        checks of the counts.
        """
        self.folder, self.interval = folder, interval
        self.skipped = 0  # as of the last check
        self._counts = torch.zeros(2)  # updates of this run: skipped, and skipped in a row
        self._watched = [b for module in modules for b in module.buffers() if b.is_floating_point()]
        # Views are created once: creating them costs more than the kernels that use them.
        self._flat = [value.detach().view(-1) for value in self._watched]
        self._good = torch.cat(self._flat) if self._flat else torch.zeros(0)
        self._now = torch.empty_like(self._good)
        parts = torch.split(self._good, [value.numel() for value in self._watched])
        self._restored = [part.view(value.shape) for part, value in zip(parts, self._watched, strict=True)]
        self._alert = False
        self._delayed_counts: DelayedRead[None] = DelayedRead()

    def record_norm(self, norm: Tensor) -> None:
        """Record the gradient norm of an update, without synchronising with the GPU."""
        bad = (~norm.isfinite()).float()
        self._counts = (self._counts.to(norm.device) + bad) * torch.stack((torch.ones_like(bad), bad))

    def check(self, batch: Batch, progress: Progress, terms: Mapping[str, Tensor]) -> str | None:
        """Restore the statistics and check the counts every `interval` steps; call it after every step.

        Synchronises with the GPU only while updates are being skipped.

        Returns a warning if updates were skipped since the last check. Raises DivergedError if too many were
        skipped in a row.
        """
        self.restore_buffers()
        if not (self._alert or (progress.step % self.interval == 0 and self._has_skipped())):
            return None
        self._delayed_counts.forget()  # it is older than what is read now
        skipped, in_row = (int(value) for value in self._counts.tolist())
        new, self.skipped = skipped - self.skipped, skipped
        self._alert = bool(new)
        if not new:
            return None
        place = f"epoch {progress.epoch + 1}, step {progress.step}"
        if in_row >= MAX_CONSECUTIVE_SKIPS:
            saved = self._save(batch, progress, terms)
            raise DivergedError(
                f"{in_row} updates in a row had a loss or gradient that is not a finite number{saved}",
                place,
                "lower lr0 or --distill-ratio, look at the labels, or try --no-amp; the last checkpoint "
                "is intact",
            )
        return f"{place}: loss or gradient is not a finite number, update skipped ({skipped} so far)"

    def _has_skipped(self) -> bool:
        """Whether updates were skipped since the last check, as of a few steps ago on a GPU."""
        seen = self._delayed_counts(self._counts, None)
        return seen is not None and int(seen[0][0]) > self.skipped

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Replace non-finite values in buffers by the last finite ones.

        A bad batch leaves NaN in running means, which later batches cannot average away. Restoring must not
        wait for the update either: with gradient accumulation, the batches before it would build on the
        corrupted statistics. It does not synchronise: a handful of kernels per step.
        """
        if not self._watched:
            return
        torch.cat(self._flat, out=self._now)
        torch.where(self._now.isfinite(), self._now, self._good, out=self._good)
        torch._foreach_copy_(self._watched, self._restored)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, for resuming; synchronises with the GPU."""
        skipped, in_row = (int(value) for value in self._counts.tolist())
        return {"skipped": skipped, "in_row": in_row, "told": self.skipped}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the counts; from here on, the buffers as they are now are the last good ones."""
        self._counts = torch.tensor([float(saved["skipped"]), float(saved["in_row"])])
        self.skipped = int(saved["told"])
        self.restore_buffers()

    def _save(self, batch: Batch, progress: Progress, terms: Mapping[str, Tensor]) -> str:
        if self.folder is None:
            return ""
        path = self.folder / (f"bad_batch_{rank()}.pt" if rank() else "bad_batch.pt")
        content: dict[str, Any] = {
            "images": batch.images.detach().cpu(),
            "targets": batch.targets,
            "labelled": batch.labelled,
            "paths": list(batch.paths),
            "epoch": progress.epoch,
            "step": progress.step,
            "terms": {name: float(value.detach()) for name, value in terms.items()},
        }
        replace_atomically(path, lambda stream: torch.save(content, stream))
        return f" (the last batch is in {path})"
