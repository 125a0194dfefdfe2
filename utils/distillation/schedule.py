"""How strongly the teacher is heard in the course of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from utils.batch import Progress


@dataclass(frozen=True)
class DistillSchedule:
    """A factor on the distillation loss, a pure function of progress.

    It rises along a line for `warmup_epochs` (at least 100 steps, none for 0), then stays
    (`constant`) or falls along a cosine to `final` at the end of the run, and is 0 in the last
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
        return progress.warmed(self.warmup_epochs) >= 1

    def factor(self, progress: Progress) -> float:
        """The factor at a step, 0..1."""
        if self.is_over(progress):
            return 0.0
        warmed = progress.warmed(self.warmup_epochs)
        if self.kind == "constant":
            return warmed
        taught = progress.steps_per_epoch * max(progress.epochs - self.stop_epochs, 1)
        fall = (1 - math.cos(math.pi * min(progress.step / taught, 1.0))) / 2
        return warmed * (1 - fall * (1 - self.final))
