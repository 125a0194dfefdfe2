"""Steps whose loss or gradient is no finite number: skipped, counted, and the end of a run when many."""

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
from utils.training.glance import Glance

MANY = 10  # updates in a row; a loss scaler needs fewer to find its scale
INTERVAL = 10  # steps between two looks at a GPU; each finds what the look before has asked for


class DivergedError(UserError):
    """A run that does not recover from numbers that are none."""


class StepGuard:
    """Watches the gradient norms of a run.

    The update itself is skipped by the loss scaler, on the device. What the guard adds: it counts, it
    puts the statistics of batch norms back that a broken batch has spoilt, after every step and on the
    device too, and it stops a run that does not recover, with the batch on the disk.
    """

    def __init__(self, modules: list[nn.Module], folder: Path | None = None, interval: int = 1) -> None:
        """`modules` are those whose buffers are watched over, the network and its average.

        folder: where each rank saves its batch, for any one may be the broken one. interval: steps
        between two looks at the device.
        """
        self.folder, self.interval = folder, interval
        self.skipped = 0  # as far as it was told
        self._counts = torch.zeros(2)  # of this run: skipped, and skipped in a row
        self._watched = [b for module in modules for b in module.buffers() if b.is_floating_point()]
        # Views, made once: to make them anew costs more than what is done with them.
        self._flat = [value.detach().view(-1) for value in self._watched]
        self._good = torch.cat(self._flat) if self._flat else torch.zeros(0)
        self._now = torch.empty_like(self._good)
        parts = torch.split(self._good, [value.numel() for value in self._watched])
        self._mended = [part.view(value.shape) for part, value in zip(parts, self._watched, strict=True)]
        self._alert = False
        self._glance: Glance[None] = Glance()

    def note(self, norm: Tensor) -> None:
        """Takes in the norm of all gradients of an update; does not wait for the device."""
        bad = (~norm.isfinite()).float()
        self._counts = (self._counts.to(norm.device) + bad) * torch.stack((torch.ones_like(bad), bad))

    def check(self, batch: Batch, progress: Progress, terms: Mapping[str, Tensor]) -> str | None:
        """Mends the statistics and, now and then, looks at the counts; to be called after every step.

        Waits for a GPU only while updates are skipped.

        Gives a warning where an update was skipped since. Raises DivergedError when too many were in a row.
        """
        self.mend()
        if not (self._alert or progress.step % self.interval == 0):
            return None
        seen = (self._counts, None) if self._alert else self._glance(self._counts, None)
        if seen is None:
            return None
        skipped, in_row = (int(value) for value in seen[0].tolist())
        new, self.skipped = skipped - self.skipped, skipped
        self._alert = bool(new)
        if not new:
            return None
        place = f"epoch {progress.epoch + 1}, step {progress.step}"
        if in_row >= MANY:
            saved = self._save(batch, progress, terms)
            raise DivergedError(
                f"{in_row} updates in a row had a loss or gradient that is no finite number{saved}",
                place,
                "lower lr0 or --distill-ratio, look at the labels, or try --no-amp; the last checkpoint "
                "is intact",
            )
        return f"{place}: loss or gradient is no finite number, update skipped ({skipped} so far)"

    @torch.no_grad()
    def mend(self) -> None:
        """Puts the last finite number in the place of every one in a buffer that is none.

        A broken batch leaves NaN in running means, which no later batch can average away. It must not wait
        for the update of its gradients either: with several batches an update the next ones would take what
        it has left for good. Without a question to the device: this is a handful of kernels a step.
        """
        if not self._watched:
            return
        torch.cat(self._flat, out=self._now)
        torch.where(self._now.isfinite(), self._now, self._good, out=self._good)
        torch._foreach_copy_(self._watched, self._mended)

    def state_dict(self) -> dict[str, Any]:
        """The counts, for a run that goes on; waits for the device."""
        skipped, in_row = (int(value) for value in self._counts.tolist())
        return {"skipped": skipped, "in_row": in_row, "told": self.skipped}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Goes on from such counts, and from the buffers as they are now."""
        self._counts = torch.tensor([float(saved["skipped"]), float(saved["in_row"])])
        self.skipped = int(saved["told"])
        self.mend()

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
