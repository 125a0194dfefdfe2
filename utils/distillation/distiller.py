"""The distillation loss of a run, and the recipe that adds it to training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from models.checkpoint import resolve_weights
from models.decode import decode
from utils.batch import Batch, Progress, StudentOutput
from utils.config.options import DistillOptions
from utils.distillation.features import FeatureLoss
from utils.distillation.presets import DenseOutputs, ObjectnessGated, Preset, PseudoBoxes
from utils.distillation.response import Response, ResponseGains
from utils.distillation.schedule import DistillSchedule
from utils.distillation.teacher import Teacher
from utils.errors import UserError
from utils.losses.detection import DetectionLoss, level_balance
from utils.losses.recipe import Loss, LossContext, LossRecipe, ground_truth_only


class Distiller(nn.Module):
    """One forward of the teacher a step, and its comparison with the student.

    The teacher is a plain attribute: it is in no state dict, no optimizer and no DDP wrapper. The
    projections of a feature loss are parameters, trained with the student's.
    """

    label = "distill"

    def __init__(
        self,
        teacher: Teacher,
        preset: Preset | None,
        ratio: float,
        schedule: DistillSchedule = DistillSchedule(),  # noqa: B008
        features: FeatureLoss | None = None,
        feature_ratio: float = 1.0,
    ) -> None:
        """`ratio` weighs the terms of the preset, `feature_ratio` that of the features."""
        super().__init__()
        self.teacher, self.preset, self.ratio, self.schedule = teacher, preset, ratio, schedule
        self.features, self.feature_ratio = features, feature_ratio
        names = (*(preset.names if preset else ()), *(("feature",) if features else ()))
        self.names: tuple[str, ...] = tuple(f"distill_{name}" for name in names)

    def forward(self, batch: Batch, output: StudentOutput, progress: Progress) -> dict[str, Tensor]:
        """The terms times ratio and schedule, float32 scalars; zeros once teaching is over."""
        if self.schedule.is_over(progress):
            return dict.fromkeys(self.names, torch.zeros((), device=batch.images.device))
        taught = self.teacher(batch.images)
        own = self.teacher.fit.of_student(output)
        factor = self.schedule.factor(progress)
        terms: dict[str, Tensor] = {}
        if self.preset is not None:
            found = self.preset(batch, own, taught)
            terms = {f"distill_{name}": value * (factor * self.ratio) for name, value in found.items()}
        if self.features is not None:
            weights = [taught.own_levels[pair.teacher] for pair in self.teacher.fit.levels]
            distance = self.features(own.features, taught.features, weights)
            terms["distill_feature"] = distance * (factor * self.feature_ratio)
        return terms

    def finish(self) -> None:
        """Checks at the end of a run that the teacher is what it was at the start."""
        self.teacher.assert_unchanged()


def distillation_recipe(options: DistillOptions) -> LossRecipe:
    """The recipe of `train_distill.py`: the ground-truth loss (unless turned off) and a Distiller.

    Raises UserError where there is no teacher.
    """
    if not options.distill:
        return ground_truth_only
    path = resolve_weights(options.teacher)

    def recipe(context: LossContext) -> Sequence[Loss]:
        distiller = build_distiller(options, path, context)
        return [context.detection, distiller] if options.with_gt_loss else [distiller]

    return recipe


def build_distiller(options: DistillOptions, teacher_path: Path, context: LossContext) -> Distiller:
    """Loads the teacher, finds what fits, says how good it is, and picks the losses."""
    scale = (options.teacher_img_size or context.image_size) / context.image_size
    teacher = Teacher.from_file(teacher_path, context.device, options.teacher_cfg, scale)
    teacher.fit_to(context.model, context.names)
    preset = build_preset(options, context, teacher)
    features = build_features(options, context, teacher, needed=preset is None)
    if scale == 1 and teacher.fit.classes.is_identity:
        map50, map50_95 = context.evaluate(teacher.model)
        context.say(
            f"teacher {teacher_path}: mAP50 {map50:.3f}, mAP50-95 {map50_95:.3f} on the validation split"
        )
    else:
        context.say(f"teacher {teacher_path}: {teacher.fit.classes}")
    schedule = DistillSchedule(
        options.distill_schedule, options.distill_final, options.distill_warmup, options.stop_distill
    )
    return Distiller(teacher, preset, options.distill_ratio, schedule, features, options.feature_ratio)


def build_features(
    options: DistillOptions, context: LossContext, teacher: Teacher, needed: bool
) -> FeatureLoss | None:
    """The feature loss that the options name; one all the same where nothing else is left to learn from."""
    kind = options.feature_loss
    if kind == "none" and not needed:
        return None
    pairs = teacher.fit.levels
    own = [_channels(context.model.head.m[pair.student]) for pair in pairs]
    wanted = [_channels(teacher.model.head.m[pair.teacher]) for pair in pairs]
    return FeatureLoss("cwd" if kind == "none" else kind, own, wanted).to(context.device)


def _channels(convolution: nn.Module) -> int:
    assert isinstance(convolution, nn.Conv2d)
    return convolution.in_channels


def build_preset(options: DistillOptions, context: LossContext, teacher: Teacher) -> Preset | None:
    """The preset that the options name, for the levels and classes that both sides have; None without any."""
    fit = teacher.fit
    if not fit.classes.student:
        if not options.with_gt_loss:
            raise UserError(
                "it knows none of the data's classes, so that nothing would train the head",
                teacher.source,
                "leave --no-with-gt-loss out",
            )
        context.say(f"{teacher.source} knows none of the data's classes: only features are learnt from it")
        return None
    gains, rows = context.detection.gains, [pair.student for pair in fit.levels]
    anchors = context.detection.anchors_grid[rows]
    match options.preset():
        case "response":
            own = ResponseGains(options.distill_box, options.distill_obj, options.distill_cls)
            balance = [level_balance(len(context.detection.anchors_grid))[row] for row in rows]
            return Response(gains, anchors, own, balance=balance, complete=not fit.classes.unknown)
        case "boxes":
            strides = context.model.stride[rows]
            return PseudoBoxes(
                DetectionLoss(anchors, len(fit.classes.student), gains).to(context.device),
                partial(decode, anchors_px=anchors * strides.view(-1, 1, 1), strides=strides),
                confidence=options.t_conf_thres,
                overlap=options.t_nms_thres,
                soft=options.soft_loss,
                temperature=options.temperature,
            )
        case "objectness":
            return ObjectnessGated(gains)
        case "kl":
            return DenseOutputs(gains, "kl", options.temperature)
        case _:
            return DenseOutputs(gains, "l2", options.temperature)
