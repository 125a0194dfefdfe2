"""Construction of the losses from the options of `train_distill.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from torch import nn

from models.config import find_config
from models.places import resolve_weights
from models.yolo import Model
from utils.config.options import OWN_AVERAGE, DistillOptions
from utils.distillation.balance import GradientBalance
from utils.distillation.diagnosis import Diagnosis
from utils.distillation.distiller import Distiller
from utils.distillation.ensemble import Teachers
from utils.distillation.features import FeatureLoss
from utils.distillation.presets import DenseOutputs, ObjectnessGated, Preset
from utils.distillation.pseudo_boxes import PseudoBoxes
from utils.distillation.response import Response, ResponseGains
from utils.distillation.schedule import DistillSchedule
from utils.distillation.teacher import Teacher, TeacherInStudentFrame
from utils.errors import UserError
from utils.losses.detection import DetectionLoss, level_balance
from utils.losses.recipe import Loss, LossContext, LossRecipe, ground_truth_only
from utils.words import counted, first_names, listed

_MATCHED_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of images, so that strides agree: `fit_networks`


def distillation_recipe(options: DistillOptions) -> LossRecipe:
    """Return a recipe for the ground-truth loss (unless turned off) and a Distiller.

    Raises UserError if a teacher's weight file or its network YAML is missing.
    """
    if not options.distill:
        return ground_truth_only
    if options.teacher_cfg:
        find_config(options.teacher_cfg)
    paths = [
        None if name == OWN_AVERAGE else resolve_weights(name, options.fetches) for name in options.teacher
    ]

    def recipe(context: LossContext) -> Sequence[Loss]:
        distiller = build_distiller(options, paths, context)
        return [context.detection, distiller] if options.with_gt_loss else [distiller]

    return recipe


def build_distiller(options: DistillOptions, paths: Sequence[Path | None], context: LossContext) -> Distiller:
    """Load the teachers (None: the student's EMA), match them to the student and print their scores."""
    scale = teacher_scale(options, context)
    members = [
        Teacher(context.ema, "the student's own average", scale, frozen=False)
        if path is None
        else Teacher.from_file(path, context.device, options.teacher_cfg, scale)
        for path in paths
    ]
    teachers = Teachers(members, context.model, context.names, context.merged)
    preset = build_preset(options, context, teachers)
    schedule = DistillSchedule(
        options.distill_schedule, options.distill_final, options.distill_warmup, options.stop_distill
    )
    is_auto = options.distill_ratio == "auto"
    return Distiller(
        teachers,
        preset,
        GradientBalance(options.auto_ratio) if is_auto else float(options.distill_ratio),
        schedule,
        build_features(options, context, teachers, needed=preset is None),
        options.feature_ratio,
        compare_scores(options, context, teachers),
    )


def teacher_scale(options: DistillOptions, context: LossContext) -> float:
    """Return the side of a teacher's images over that of the student's.

    What is asked for as a multiple of --imgsz that can be matched holds for its rounded size as well. Other
    sizes are rounded up like it, so that equal numbers mean equal sizes.
    """
    asked, multiple = options.teacher_img_size, context.model.size_multiple
    if asked / options.imgsz in _MATCHED_SCALES:
        return asked / options.imgsz
    return (math.ceil(asked / multiple) * multiple or context.image_size) / context.image_size


def response_gains(options: DistillOptions, class_count: int) -> ResponseGains:
    """Return the weights of the terms: those given as options, else the defaults for the class count."""
    named = {term: getattr(options, f"distill_{term}") for term in ("box", "obj", "cls")}
    given = {term: weight for term, weight in named.items() if weight is not None}
    return replace(ResponseGains.for_classes(class_count), **given)


def warn_of_a_lonely_class(options: DistillOptions, context: LossContext, shared: int) -> None:
    """Warn if the class term is a softmax KL, but teacher and data share only one of several classes."""
    if shared == 1 and len(context.names) > 1 and (options.preset() == "kl" or options.soft_loss):
        instead = "leave --soft-loss out" if options.soft_loss else "take --distill-loss l2 or response"
        context.warn(
            "KL compares classes with one another, and the teacher knows one of the data's alone: "
            f"there is no class term; {instead}"
        )


def compare_scores(options: DistillOptions, context: LossContext, teachers: Teachers) -> Diagnosis:
    """Print the scores of teachers and student on the validation split; warn if no teacher is better.

    Each teacher is compared with the student over the classes that the teacher knows.
    """
    judged = {}
    for member in teachers.members:
        for line in filter(None, (member.remark, member.mapping)):
            context.say(f"teacher {member.source}: {line}")
        if member.is_frozen and member.known.student:
            known = member.known
            network = cast(Model, TeacherInStudentFrame(member, len(context.names)))
            map50, map50_95 = judged[member] = context.evaluate(network).over(known.student)
            part = f" over {counted(len(known.student), 'class')} that it knows"
            context.say(
                f"teacher {member.source}: mAP50 {map50:.3f}, mAP50-95 {map50_95:.3f} on the validation split"
                f"{part if known.unknown and not known.one else ''}"
            )
    if teachers.note:
        context.say(teachers.note)
    if advice := advice_on_names(teachers):
        context.warn(advice)
    of_all = {member.title: scores for member, scores in judged.items() if not member.known.unknown}
    best = max((map50_95 for _, map50_95 in of_all.values()), default=None)
    is_auto = options.distill_ratio == "auto"
    diagnosis = Diagnosis(
        best,
        1.0 if isinstance(options.distill_ratio, str) else options.distill_ratio,
        held_at=options.auto_ratio if is_auto else None,
        scores=of_all,
    )
    if context.is_new:
        student = context.evaluate(context.model)
        map50, map50_95 = student.over()
        context.say(f"student at the start: mAP50 {map50:.3f}, mAP50-95 {map50_95:.3f}")
        pairs = [(scores[1], student.over(member.known.student)[1]) for member, scores in judged.items()]
        in_part = any(member.known.unknown and not member.known.one for member in judged)
        for text in diagnosis.at_start(pairs, " over the classes that it knows" if in_part else ""):
            context.warn(text)
    return diagnosis


def advice_on_names(teachers: Teachers) -> str:
    """Return what to do if classes of the data are unknown, but perhaps known by other names; else ""."""
    unknown = teachers.fit.classes.unknown
    others = {name: None for member in teachers.members for name in member.known.ignored}
    if not unknown or not others:
        return ""
    who = "the teacher does" if len(teachers.members) == 1 else "the teachers do"
    return (
        f"{who} not know {listed(unknown)}; if they are only called otherwise there (as in "
        f"{first_names(list(others))}), write the same names in the data's YAML"
    )


def build_features(
    options: DistillOptions, context: LossContext, teachers: Teachers, needed: bool
) -> list[FeatureLoss]:
    """Return a feature loss per teacher, as the options name it; `cwd` if one is needed but none is named."""
    kind = options.feature_loss
    if kind == "none" and not needed:
        return []
    kind = "cwd" if kind == "none" else kind
    losses = []
    for member in teachers.members:
        pairs = member.fit.levels
        student_channels = [_channels(context.model.head.m[pair.student]) for pair in pairs]
        teacher_channels = [_channels(member.model.head.m[pair.teacher]) for pair in pairs]
        losses.append(FeatureLoss(kind, student_channels, teacher_channels).to(context.device))
    return losses


def _channels(convolution: nn.Module) -> int:
    assert isinstance(convolution, nn.Conv2d)
    return convolution.in_channels


def refuse_untaught_parts(context: LossContext, teachers: Teachers) -> None:
    """Raise UserError if without the ground-truth loss a part of the student's head would stay untrained."""
    fit, levels = teachers.fit, len(context.detection.anchors_grid)
    parts = [f"classes {', '.join(fit.classes.unknown)}"] if fit.classes.unknown else []
    if len(fit.levels) < levels:
        parts.append(f"{levels - len(fit.levels)} of the student's {levels} levels")
    if parts:
        raise UserError(
            f"it says nothing about {' and '.join(parts)}, which nothing would train",
            teachers.source,
            "leave --no-with-gt-loss out",
        )


def build_preset(options: DistillOptions, context: LossContext, teachers: Teachers) -> Preset | None:
    """Return the preset of the options for the shared levels and classes; None if no class is shared."""
    fit = teachers.fit
    if not fit.classes.student:
        if not options.with_gt_loss:
            raise UserError(
                f"{teachers.ignorance}, so that nothing would train the head",
                "--no-with-gt-loss",
                "leave it out",
            )
        kind = "cwd" if options.feature_loss == "none" else options.feature_loss
        them = "it" if len(teachers.members) == 1 else "them"
        tell = context.warn if "distill_loss" in options.given else context.say
        tell(f"{teachers.ignorance}: only features are learnt from {them} (--feature-loss {kind})")
        return None
    if not options.with_gt_loss:
        refuse_untaught_parts(context, teachers)
    rows = [pair.student for pair in fit.levels]
    # Class terms are means over the shared classes: rescaled, a class weighs the same among few as among all.
    gains = context.detection.gains
    gains = replace(gains, cls=gains.cls * len(fit.classes.student) / len(context.names))
    anchors = context.detection.anchors_grid[rows]
    balance = [level_balance(len(context.detection.anchors_grid))[row] for row in rows]
    complete = not fit.classes.unknown
    warn_of_a_lonely_class(options, context, len(fit.classes.student))
    match options.preset():
        case "response":
            term_weights = response_gains(options, len(context.names))
            weights = ", ".join(
                f"{weight:g}" for weight in (term_weights.box, term_weights.obj, term_weights.cls)
            )
            classes = counted(len(context.names), "class")
            context.say(f"weights of distillation's box, objectness and class terms: {weights} ({classes})")
            return Response(gains, anchors, term_weights, balance=balance, complete=complete)
        case "boxes":
            return PseudoBoxes(
                DetectionLoss(
                    anchors,
                    len(fit.classes.student),
                    gains,
                    balance=balance,
                    complete=complete,
                    # A single shared class still has to be told from classes that the teacher lacks.
                    has_class_term=len(context.names) > 1,
                ).to(context.device),
                context.model.stride[rows],
                confidence=options.t_conf_thres,
                overlap=options.t_nms_thres,
                soft=options.soft_loss,
                temperature=options.temperature,
            )
        case "objectness":
            return ObjectnessGated(gains, complete=complete)
        case "kl":
            return DenseOutputs(gains, "kl", options.temperature)
        case _:
            return DenseOutputs(gains, "l2", options.temperature)
