"""How strongly the teacher is heard in the course of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from utils.batch import Progress


@dataclass(frozen=True)
class DistillSchedule:
    """A factor on the distillation loss, a pure function of progress.

    It rises along a line for `warmup_epochs` (none for 0), then stays (`constant`) or falls
    along a cosine to `final` at the end of the run, and is 0 in the last
    `stop_epochs`, in which the teacher is not asked any more.
    """

    kind: Literal["constant", "cosine"] = "constant"
    final: float = 1.0
    warmup_epochs: float = 0.0
    stop_epochs: int = 0

    def is_over(self, progress: Progress) -> bool:
        """Whether the run has come to its closing epochs."""
        return progress.epoch >= progress.epochs - self.stop_epochs

    def is_warm(self, progress: Progress) -> bool:
        """Whether the warm-up is done."""
        return self._warmed(progress) >= 1

    def factor(self, progress: Progress) -> float:
        """The factor at a step, 0..1."""
        if self.is_over(progress):
            return 0.0
        warmed = self._warmed(progress)
        if self.kind == "constant" or warmed < 1:
            return warmed
        begun = self.warmup_epochs * progress.steps_per_epoch
        taught = progress.steps_per_epoch * max(progress.epochs - self.stop_epochs, 1)
        done = min((progress.step - begun) / max(taught - begun, 1), 1.0)
        return 1 - (1 - math.cos(math.pi * done)) / 2 * (1 - self.final)

    def _warmed(self, progress: Progress) -> float:
        # The learning rate's own warm-up lasts 100 steps at the least; this one is as long as was asked for.
        return progress.warmed(self.warmup_epochs, least=1)
