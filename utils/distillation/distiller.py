"""The distillation loss of a run: one forward of the teacher a step, and its comparison with the student."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from utils.batch import Batch, Progress, StudentOutput
from utils.distillation.balance import GradientBalance
from utils.distillation.diagnosis import Diagnosis
from utils.distillation.ensemble import Teachers
from utils.distillation.features import FeatureLoss
from utils.distillation.presets import DensePreset, Preset, PseudoBoxes, ahead_of
from utils.distillation.schedule import DistillSchedule
from utils.distillation.teacher import InStudentsTerms, fitted
from utils.errors import UserError
from utils.losses.recipe import Body, EpochReport, Terms
from utils.losses.terms import TermsOfTensors
from utils.streams import joined_side_stream, on_side_stream


@dataclass
class _EpochSoFar:
    """What is summed over the steps of an epoch.

    sums: scalars on the device: the unweighted losses that are finite numbers, how many these are, and
    the box terms. factors: the schedule's.
    """

    # On no device yet: such scalars go with those of any.
    sums: tuple[Tensor, ...] = field(default_factory=lambda: tuple(torch.zeros(3).unbind()))
    steps: int = 0
    factors: float = 0.0
    warm: bool = True

    def add(self, terms: Mapping[str, Tensor], factor: float, warm: bool) -> None:
        """Takes in the terms of a step."""
        total = torch.stack([value.detach() for value in terms.values()]).sum()
        finite = total.isfinite()
        box = terms["box"].detach() if "box" in terms else torch.zeros_like(total)
        added = (torch.where(finite, total, 0.0), finite.float(), box)
        self.sums = tuple(new + old for new, old in zip(added, self.sums, strict=True))
        self.steps, self.factors, self.warm = self.steps + 1, self.factors + factor, self.warm and warm


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
        # What --distill-ratio would be.
        self.gauges = () if self.balance is None else (f"{self.label}_ratio",)
        self._seen = _EpochSoFar()

    def readings(self) -> dict[str, Tensor]:
        """The weight that follows the gradients, under the name in `gauges`."""
        return {} if self.balance is None else dict.fromkeys(self.gauges, self.balance())

    def forward(self, batch: Batch, output: StudentOutput, progress: Progress) -> dict[str, Tensor]:
        """The terms times ratio and schedule, float32 scalars; zeros once teaching is over."""
        return self.ahead(batch, progress)(output)

    def ahead(self, batch: Batch, progress: Progress) -> Terms:
        """What is to be done before the student's pass; gives the rest of `forward`."""
        if self.schedule.is_over(progress):
            return lambda _: self._nothing(batch)
        compare, factor = self.heard(batch), self.schedule.factor(progress)

        def weighted(output: StudentOutput) -> dict[str, Tensor]:
            terms = compare(output)
            if self.training:
                self._seen.add(terms, factor, self.schedule.is_warm(progress))
            weight = self.balance() * factor if self.balance is not None else self.ratio * factor
            return {f"distill_{name}": value * weight for name, value in terms.items()}

        return weighted

    def _nothing(self, batch: Batch) -> dict[str, Tensor]:
        """Zeros, tied to the projections: data-parallel training wants a gradient for every parameter."""
        nothing = torch.zeros((), device=batch.images.device)
        nothing = nothing + sum((parameter.sum() * 0 for parameter in self.parameters()), start=nothing)
        return dict.fromkeys(self.names, nothing)

    def compare(self, batch: Batch, output: StudentOutput) -> dict[str, Tensor]:
        """The terms as they are, without weight."""
        return self.heard(batch)(output)

    def heard(self, batch: Batch) -> Terms:
        """Asks the teachers; gives what makes of a student's output the terms as they are.

        A GPU asks them, and looks for what they have detected, beside the student's pass.
        """
        device = batch.images.device
        with on_side_stream(device):
            taught, each = self.teachers(batch.images)
        preset = self.preset
        rest = joined_side_stream(device, lambda: None if preset is None else ahead_of(preset, batch, taught))

        def compare(output: StudentOutput) -> dict[str, Tensor]:
            against = rest()
            terms = {} if against is None else against(self.teachers.fit.of_student(output))
            if self.features:
                distances = []
                for loss, member, view in zip(self.features, self.teachers.members, each, strict=True):
                    own = [output.features[pair.student] for pair in member.fit.levels]
                    distances.append(loss(own, view.features, view.own_levels))
                terms["feature"] = torch.stack(distances).mean() * self.feature_ratio
            return terms

        return compare

    def networks(self) -> dict[str, nn.Module]:
        """The teachers that are not the student itself, as they answer to the student's pictures."""
        return {
            member.title: InStudentsTerms(member, self.teachers.class_count)
            for member in self.teachers.members
            if member.is_frozen
        }

    def references(self) -> dict[str, tuple[float, float]]:
        """mAP50 and mAP50-95 of the teachers that know all of the data's classes, as at the start."""
        return {} if self.diagnosis is None else self.diagnosis.scores

    @torch.no_grad()
    def compile_networks(self, compiled: Callable[[Body], Body], images: Tensor) -> None:
        """Lets every teacher run as `compiled` makes it, beginning with images (B, 3, H, W) like these."""
        for member in self.teachers.members:
            member.body = compiled(member.body)
            with member.precision():
                member.body(fitted(images, member))

    def replay_networks(self, replayed: Callable[[Body], Body]) -> None:
        """Lets every frozen teacher run as `replayed` makes it; its maps are good until its next call."""
        for member in self.teachers.members:
            if member.is_frozen:
                member.body = replayed(member.body)

    def replay_terms(self, replayed: Callable[[TermsOfTensors], TermsOfTensors]) -> None:
        """Lets a dense preset work its terms out as `replayed` makes it."""
        if isinstance(self.preset, DensePreset):
            self.preset.replay_terms(replayed)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Keeps the weights of frozen teachers in the reduced precision that they answer in."""
        for member in self.teachers.members:
            member.compute_in(dtype)

    def observe(self, gradient_ratio: Tensor, progress: Progress) -> None:
        """Takes in the measured norm of its gradient, relative to that of the labels' loss."""
        if self.balance is not None and not self.schedule.is_over(progress):
            self.balance.observe(gradient_ratio, self.schedule.factor(progress))

    def review(self, report: EpochReport) -> Iterator[str]:
        """What looks wrong after an epoch; waits for the device."""
        seen, self._seen = self._seen, _EpochSoFar()
        if self.diagnosis is None or not seen.steps:
            return iter(())
        ratio, factor = report.means.get(f"{self.label}_grad_ratio"), seen.factors / seen.steps
        if ratio is not None:
            ratio = ratio / factor if factor > 0 else None
        total, finite, boxes = map(float, seen.sums)
        sees = boxes != 0 or not isinstance(self.preset, PseudoBoxes)
        mean = total / finite if finite else math.nan
        return self.diagnosis.after_epoch(mean, ratio, report.map50_95, seen.warm, sees)

    def get_extra_state(self) -> dict[str, Any]:
        """What a run that goes on needs: its teachers' checksums, and what the diagnosis has seen."""
        seen, diagnosis = self._seen, self.diagnosis
        return {
            "teachers": self.teachers.checksums(),
            "seen": [[float(value) for value in seen.sums], seen.steps, seen.factors, seen.warm],
            "said": sorted(diagnosis.said) if diagnosis else [],
            "losses": list(diagnosis.losses) if diagnosis else [],
        }

    def set_extra_state(self, saved: dict[str, Any]) -> None:
        """Raises UserError where a teacher is not the one that the run began with."""
        if saved["teachers"] != self.teachers.checksums():
            raise UserError(
                "its weights are not those that the run began with",
                self.teachers.source,
                "put the file back, or start a new run",
            )
        sums, steps, factors, warm = saved["seen"]
        if not isinstance(sums, list):  # an older state has the losses' sum alone
            sums = [sums, float(steps), 1.0]
        self._seen = _EpochSoFar(tuple(torch.tensor(sums).unbind()), steps, factors, warm)
        if self.diagnosis is not None:
            self.diagnosis.said, self.diagnosis.losses = set(saved["said"]), list(saved["losses"])

    def finish(self) -> None:
        """Checks at the end of a run that the teachers are what they were at the start."""
        self.teachers.assert_unchanged()
