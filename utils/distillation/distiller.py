"""The distillation loss: one forward pass of the teacher per step, and its comparison with the student."""

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
from utils.distillation.presets import Preset, ahead_of
from utils.distillation.pseudo_boxes import PseudoBoxes
from utils.distillation.schedule import DistillSchedule
from utils.distillation.teacher import TeacherInStudentFrame, fitted
from utils.errors import UserError
from utils.losses.recipe import Body, EpochReport, Terms
from utils.losses.terms import TermsOfTensors
from utils.streams import joined_side_stream, on_side_stream


@dataclass
class _EpochSums:
    """Sums over the steps of an epoch.

    sums: scalars on the device: the finite unweighted losses, their number, and the box terms.
    factors: the sum of the schedule's factors. warm: whether the warm-up was over in every step.
    """

    # 0-d tensors on the CPU can be added to tensors on any device.
    sums: tuple[Tensor, ...] = field(default_factory=lambda: tuple(torch.zeros(3).unbind()))
    steps: int = 0
    factors: float = 0.0
    warm: bool = True

    def add(self, terms: Mapping[str, Tensor], factor: float, warm: bool) -> None:
        """Add the terms of a step."""
        total = torch.stack([value.detach() for value in terms.values()]).sum()
        finite = total.isfinite()
        box = terms["box"].detach() if "box" in terms else torch.zeros_like(total)
        added = (torch.where(finite, total, 0.0), finite.float(), box)
        self.sums = tuple(new + old for new, old in zip(added, self.sums, strict=True))
        self.steps, self.factors, self.warm = self.steps + 1, self.factors + factor, self.warm and warm


class Distiller(nn.Module):
    """The loss between the teachers' and the student's outputs for a batch.

    The teachers are a plain attribute, so they are not in the state dict, the optimizer or the DDP wrapper.
    The projections of a feature loss are parameters, trained with the student; `auto` balance is a buffer.
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
        """`ratio` weights the terms of the preset, `ratio` times `feature_ratio` the feature term.

        features: one loss per teacher, or none.
        """
        super().__init__()
        self.teachers, self.preset, self.schedule = teachers, preset, schedule
        self.balance = ratio if isinstance(ratio, GradientBalance) else None
        self.ratio = 1.0 if isinstance(ratio, GradientBalance) else ratio
        self.features, self.feature_ratio = nn.ModuleList(features), feature_ratio
        self.diagnosis = diagnosis
        names = (*(preset.names if preset else ()), *(("feature",) if features else ()))
        self.names: tuple[str, ...] = tuple(f"distill_{name}" for name in names)
        # Reports the adaptive weight, i.e. the equivalent of --distill-ratio.
        self.gauges = () if self.balance is None else (f"{self.label}_ratio",)
        self._epoch_sums = _EpochSums()

    @property
    def awaits_networks(self) -> bool:
        """Whether a step may wait for values computed from the teachers' output, see `Preset`."""
        return hasattr(self.preset, "ahead")

    def readings(self) -> dict[str, Tensor]:
        """Return the adaptive weight under its name in `gauges`."""
        return {} if self.balance is None else dict.fromkeys(self.gauges, self.balance())

    def forward(self, batch: Batch, output: StudentOutput, progress: Progress) -> dict[str, Tensor]:
        """Return the terms times ratio and schedule, float32 scalars; zeros once distillation has stopped."""
        return self.ahead(batch, progress)(output)

    def ahead(self, batch: Batch, progress: Progress) -> Terms:
        """Start the teachers' forward pass; return a function that completes `forward`."""
        if self.schedule.is_over(progress):
            return lambda _: self._nothing(batch)
        compare, factor = self.unweighted_terms(batch), self.schedule.factor(progress)

        def weighted(output: StudentOutput) -> dict[str, Tensor]:
            terms = compare(output)
            if self.training:
                self._epoch_sums.add(terms, factor, self.schedule.is_warm(progress))
            weight = self.balance() * factor if self.balance is not None else self.ratio * factor
            return {f"distill_{name}": value * weight for name, value in terms.items()}

        return weighted

    def _nothing(self, batch: Batch) -> dict[str, Tensor]:
        """Return zeros that depend on the projections: DDP expects a gradient for every parameter."""
        nothing = torch.zeros((), device=batch.images.device)
        nothing = nothing + sum((parameter.sum() * 0 for parameter in self.parameters()), start=nothing)
        return dict.fromkeys(self.names, nothing)

    def unweighted_terms(self, batch: Batch) -> Terms:
        """Run the teachers; return a function from the student's output to the unweighted terms.

        On a GPU their forward pass and the extraction of their detections run on a side stream,
        concurrently with the student's forward pass.
        """
        device = batch.images.device
        with on_side_stream(device):
            teacher_output, each = self.teachers(batch.images)
        preset = self.preset
        rest = joined_side_stream(
            device, lambda: None if preset is None else ahead_of(preset, batch, teacher_output)
        )

        def compare(output: StudentOutput) -> dict[str, Tensor]:
            against = rest()
            terms = {} if against is None else against(self.teachers.fit.of_student(output))
            if self.features:
                distances = []
                for loss, member, view in zip(self.features, self.teachers.members, each, strict=True):
                    student_features = [output.features[pair.student] for pair in member.fit.levels]
                    distances.append(loss(student_features, view.features, view.unconverted_levels))
                terms["feature"] = torch.stack(distances).mean() * self.feature_ratio
            return terms

        return compare

    def networks(self) -> dict[str, nn.Module]:
        """Return the frozen teachers by title, wrapped to take the student's images."""
        return {
            member.title: TeacherInStudentFrame(member, self.teachers.class_count)
            for member in self.teachers.members
            if member.is_frozen
        }

    @property
    def uses_average(self) -> bool:
        """Whether the student's own average is a teacher."""
        return not all(member.is_frozen for member in self.teachers.members)

    def references(self) -> dict[str, tuple[float, float]]:
        """Return initial mAP50 and mAP50-95 of the teachers that know all of the data's classes."""
        return {} if self.diagnosis is None else self.diagnosis.scores

    @torch.no_grad()
    def compile_networks(self, compiled: Callable[[Body], Body], images: Tensor) -> None:
        """Wrap every teacher's body in `compiled`, and run it once on images (B, 3, H, W)."""
        for member in self.teachers.members:
            member.body = compiled(member.body)
            with member.precision():
                member.body(fitted(images, member))

    def replay_networks(self, replayed: Callable[[Body], Body]) -> None:
        """Wrap every frozen teacher's body in `replayed`; its maps are then valid until its next call."""
        for member in self.teachers.members:
            if member.is_frozen:
                member.body = replayed(member.body)

    def replay_terms(self, replayed: Callable[[TermsOfTensors], TermsOfTensors]) -> None:
        """Wrap the terms of the preset in `replayed`."""
        if self.preset is not None:
            self.preset.replay_terms(replayed)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Convert the frozen teachers' convolutions to the reduced precision that they compute in."""
        for member in self.teachers.members:
            member.compute_in(dtype)

    def observe(self, gradient_ratio: Tensor, progress: Progress) -> None:
        """Update the balance with the gradient norm relative to that of the ground-truth loss."""
        if self.balance is not None and not self.schedule.is_over(progress):
            self.balance.observe(gradient_ratio, self.schedule.factor(progress))

    def review(self, report: EpochReport) -> Iterator[str]:
        """Return the warnings about an epoch; synchronises with the GPU."""
        epoch, self._epoch_sums = self._epoch_sums, _EpochSums()
        if self.diagnosis is None or not epoch.steps:
            return iter(())
        ratio, factor = report.means.get(f"{self.label}_grad_ratio"), epoch.factors / epoch.steps
        if ratio is not None:
            ratio = ratio / factor if factor > 0 else None
        total, finite, boxes = map(float, epoch.sums)
        sees = boxes != 0 or not isinstance(self.preset, PseudoBoxes)
        mean = total / finite if finite else math.nan
        return self.diagnosis.after_epoch(mean, ratio, report.map50_95, epoch.warm, sees)

    def get_extra_state(self) -> dict[str, Any]:
        """Return what a resumed run needs: the teachers' checksums and the state of the diagnosis."""
        epoch, diagnosis = self._epoch_sums, self.diagnosis
        return {
            "teachers": self.teachers.checksums(),
            "seen": [[float(value) for value in epoch.sums], epoch.steps, epoch.factors, epoch.warm],
            "said": sorted(diagnosis.said) if diagnosis else [],
            "losses": list(diagnosis.losses) if diagnosis else [],
        }

    def set_extra_state(self, saved: dict[str, Any]) -> None:
        """Restore the state. Raises UserError if a teacher is not the one that the run began with."""
        if saved["teachers"] != self.teachers.checksums():
            raise UserError(
                "its weights are not those that the run began with",
                self.teachers.source,
                "put the file back, or start a new run",
            )
        sums, steps, factors, warm = saved["seen"]
        if not isinstance(sums, list):  # older states have only the sum of losses
            sums = [sums, float(steps), 1.0]
        self._epoch_sums = _EpochSums(tuple(torch.tensor(sums).unbind()), steps, factors, warm)
        if self.diagnosis is not None:
            self.diagnosis.said, self.diagnosis.losses = set(saved["said"]), list(saved["losses"])

    def finish(self) -> None:
        """Check at the end of a run that the frozen teachers' weights have not changed."""
        self.teachers.assert_unchanged()
