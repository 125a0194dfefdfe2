"""Warnings about a distillation run that goes wrong, with advice on what to change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

RATIO_LOW, RATIO_HIGH = 0.05, 5.0
HELD_WITHIN = 3.0  # tolerated factor between an epoch's mean ratio and the target of auto
RISING_EPOCHS = 3  # as long as the warm-up of the learning rate


@dataclass
class Diagnosis:
    """Watches a run epoch by epoch; gives each warning once.

    teacher_map: mAP50-95 of the best teacher on the validation split, None if it cannot be compared with the
    student's. ratio: the weight that the gradient ratio is proportional to. held_at: the gradient ratio that
    an adaptive weight maintains, None for a fixed weight. said, losses: the state that a resumed run
    restores. scores: mAP50 and mAP50-95 of each teacher that can be compared.
    """

    teacher_map: float | None
    ratio: float
    held_at: float | None = None
    said: set[str] = field(default_factory=set)
    losses: list[float] = field(default_factory=list)
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)

    def at_start(self, scores: Sequence[tuple[float, float]], over: str = "") -> Iterator[str]:
        """Compare teachers and student before the first step.

        scores: mAP50-95 of each teacher and of the student, over the classes that this teacher knows; over:
        words that say so if these are not all.
        """
        if scores and all(teacher <= student for teacher, student in scores):
            teacher, student = max(scores, key=lambda pair: pair[0] - pair[1])
            yield from self._once(
                "teacher",
                f"the teacher (mAP50-95 {teacher:.3f}) is not better than the student ({student:.3f}){over}: "
                "it has nothing to teach; take a larger one, or train it on this data first",
            )

    def after_epoch(
        self,
        loss: float,
        gradient_ratio: float | None,
        student_map: float | None,
        warm: bool = True,
        sees: bool = True,
    ) -> Iterator[str]:
        """Yield the warnings about an epoch.

        loss: mean of the unweighted loss, NaN if no step had a finite one. gradient_ratio: mean, without the
        schedule's factor; None if there is none. warm: whether the warm-up of the loss's weight was over
        throughout the epoch. sees: False if the targets are the teacher's boxes and it had none.
        """
        if math.isfinite(loss):
            self.losses.append(loss)
            yield from self._on_loss(warm, sees)
        # Without boxes to learn from a larger weight would not help.
        if gradient_ratio is not None and warm and sees and math.isfinite(gradient_ratio):
            judge = self._on_ratio if self.held_at is None else self._on_held
            yield from judge(gradient_ratio)
        if student_map is not None and self.teacher_map is not None and student_map > self.teacher_map:
            yield from self._once(
                "teacher",
                f"the student (mAP50-95 {student_map:.3f}) is better than its teacher "
                f"({self.teacher_map:.3f}) now: a better teacher would take it further",
            )

    def _on_loss(self, warm: bool, sees: bool) -> Iterator[str]:
        if not sees:
            yield from self._once(
                "zero",
                "no box of the teacher reaches --t-conf-thres in these images, so that it teaches "
                "background alone; look at its boxes with detect.py, or lower the threshold",
            )
        if self.losses[-1] < 1e-9:
            yield from self._once(
                "zero",
                "the distillation loss is zero: nothing is learnt from the teacher; is it the student "
                "itself, or have all terms a weight of 0 (--distill-box, --distill-obj, --distill-cls)?",
            )
        rises = [after > before for before, after in pairwise(self.losses)]
        if warm and len(rises) >= RISING_EPOCHS and all(rises):
            yield from self._once(
                "rising",
                f"the distillation loss has risen in each of the first {len(self.losses)} epochs: the "
                "student moves away from its teacher; check that both know the same classes, or raise "
                "--distill-ratio",
            )

    def _on_ratio(self, measured: float) -> Iterator[str]:
        if RATIO_LOW <= measured <= RATIO_HIGH or measured == 0:
            return
        weak, better = measured < RATIO_LOW, float(f"{self.ratio / measured:.1g}")
        effect = "it hardly counts" if weak else "the labels hardly count"
        yield from self._once(
            "weak" if weak else "strong",
            f"the teacher's gradient is {measured:.2g} times that of the labels: {effect}; try "
            f"--distill-ratio {better:g}, or auto",
        )

    def _on_held(self, measured: float) -> Iterator[str]:
        assert self.held_at is not None
        # In the first epoch the weight is only being found.
        if len(self.losses) < 2 or 1 / HELD_WITHIN <= measured / self.held_at <= HELD_WITHIN:
            return
        yield from self._once(
            "held",
            f"the teacher's gradient is {measured:.2g} times that of the labels, where --auto-ratio asks "
            f"for {self.held_at:g}: it changes too fast for auto; try a fixed --distill-ratio",
        )

    def _once(self, key: str, text: str) -> Iterator[str]:
        if key not in self.said:
            self.said.add(key)
            yield text
