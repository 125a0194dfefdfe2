"""The distillation loss of a run: one forward of the teacher a step, and its comparison with the student."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from utils.batch import Batch, Progress, StudentOutput
from utils.distillation.balance import GradientBalance
from utils.distillation.diagnosis import Diagnosis
from utils.distillation.ensemble import Teachers
from utils.distillation.features import FeatureLoss
from utils.distillation.presets import Preset
from utils.distillation.schedule import DistillSchedule
from utils.errors import UserError
from utils.losses.recipe import EpochReport


class Distiller(nn.Module):
    """What the teachers say of a batch against what the student says of it.

    The teachers are a plain attribute: they are in no state dict, no optimizer and no DDP wrapper. The
    projections of a feature loss are parameters, trained with the student's; `auto` balance is a buffer.
    """

    label = "distill"

    def __init__(
        self,
        teachers: Teachers,
        preset: Preset | None,
        ratio: float | GradientBalance,
        schedule: DistillSchedule = DistillSchedule(),  # noqa: B008
        features: Sequence[FeatureLoss] = (),
        feature_ratio: float = 1.0,
        diagnosis: Diagnosis | None = None,
    ) -> None:
        """`ratio` weighs the terms of the preset, `ratio` times `feature_ratio` that of the features.

        features: one for each teacher, or none.
        """
        super().__init__()
        self.teachers, self.preset, self.schedule = teachers, preset, schedule
        self.balance = ratio if isinstance(ratio, GradientBalance) else None
        self.ratio = 1.0 if isinstance(ratio, GradientBalance) else ratio
        self.features, self.feature_ratio = nn.ModuleList(features), feature_ratio
        self.diagnosis = diagnosis
        names = (*(preset.names if preset else ()), *(("feature",) if features else ()))
        self.names: tuple[str, ...] = tuple(f"distill_{name}" for name in names)
        self._sum, self._steps, self._factors = torch.zeros(()), 0, 0.0

    def forward(self, batch: Batch, output: StudentOutput, progress: Progress) -> dict[str, Tensor]:
        """The terms times ratio and schedule, float32 scalars; zeros once teaching is over."""
        if self.schedule.is_over(progress):
            return dict.fromkeys(self.names, torch.zeros((), device=batch.images.device))
        terms = self.compare(batch, output)
        factor = self.schedule.factor(progress)
        self._remember(terms, factor)
        weight = self.balance() * factor if self.balance is not None else self.ratio * factor
        return {f"distill_{name}": value * weight for name, value in terms.items()}

    def compare(self, batch: Batch, output: StudentOutput) -> dict[str, Tensor]:
        """The terms as they are, without weight."""
        taught, each = self.teachers(batch.images)
        terms: dict[str, Tensor] = {}
        if self.preset is not None:
            terms.update(self.preset(batch, self.teachers.fit.of_student(output), taught))
        if self.features:
            distances = []
            for loss, member, view in zip(self.features, self.teachers.members, each, strict=True):
                own = [output.features[pair.student] for pair in member.fit.levels]
                distances.append(loss(own, view.features, view.own_levels))
            terms["feature"] = torch.stack(distances).mean() * self.feature_ratio
        return terms

    @torch.no_grad()
    def _remember(self, terms: dict[str, Tensor], factor: float) -> None:
        if self.training:
            total = torch.stack(list(terms.values())).sum()
            self._sum = total if self._steps == 0 else self._sum + total
            self._steps, self._factors = self._steps + 1, self._factors + factor

    def observe(self, gradient_ratio: Tensor, progress: Progress) -> None:
        """Takes in the measured norm of its gradient, relative to that of the labels' loss."""
        if self.balance is not None and not self.schedule.is_over(progress):
            self.balance.observe(gradient_ratio, self.schedule.factor(progress))

    def review(self, report: EpochReport) -> Iterator[str]:
        """What looks wrong after an epoch; waits for the device."""
        steps, factors, total = self._steps, self._factors, self._sum
        self._sum, self._steps, self._factors = torch.zeros(()), 0, 0.0
        if self.diagnosis is None or not steps:
            return iter(())
        mean, ratio = float(total) / steps, report.means.get(f"{self.label}_grad_ratio")
        factor = factors / steps
        if ratio is not None:
            ratio = ratio / factor if factor > 0 and self.balance is None else None
        return self.diagnosis.after_epoch(mean, ratio, report.map50_95)

    def get_extra_state(self) -> list[str]:
        """Checksums of the frozen teachers: a run goes on under the teachers that it began with."""
        return self.teachers.checksums()

    def set_extra_state(self, saved: list[str]) -> None:
        """Raises UserError where a teacher is not what it was."""
        if saved != self.teachers.checksums():
            raise UserError(
                "its weights are not those that the run began with",
                self.teachers.source,
                "put the file back, or start a new run",
            )

    def finish(self) -> None:
        """Checks at the end of a run that the teachers are what they were at the start."""
        self.teachers.assert_unchanged()
