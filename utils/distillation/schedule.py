"""The schedule of the distillation loss's weight over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from utils.batch import Progress


@dataclass(frozen=True)
class DistillSchedule:
    """A factor on the distillation loss, a pure function of progress.

    It rises linearly for `warmup_epochs` (0: no warm-up), then stays constant (`constant`) or falls
    along a cosine to `final` (`cosine`), and is 0 in the last `stop_epochs`, in which the teacher
    is not run. The cosine reaches `final` when these begin.
    """

    kind: Literal["constant", "cosine"] = "constant"
    final: float = 1.0
    warmup_epochs: float = 0.0
    stop_epochs: int = 0

    def is_over(self, progress: Progress) -> bool:
        """Return whether the run is in its last `stop_epochs`."""
        return progress.epoch >= progress.epochs - self.stop_epochs

    def is_warm(self, progress: Progress) -> bool:
        """Return whether the warm-up is over."""
        return self._warmed(progress) >= 1

    def factor(self, progress: Progress) -> float:
        """Return the factor at a step, 0..1."""
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
        # No minimum of 100 steps, unlike the warm-up of the learning rate: it lasts as long as asked for.
        return progress.warmed(self.warmup_epochs, least=1)
