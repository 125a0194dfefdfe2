"""The options of train_distill.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from utils.config.options_base import DATA, TEACHER
from utils.config.options_train import TrainOptions
from utils.config.settings import above, at_least, between, option

OWN_AVERAGE = "ema"  # value of --teacher for the student's own moving average
Preset = Literal["response", "boxes", "objectness", "l2", "kl"]
PRESETS: tuple[str, ...] = get_args(Preset)


# The weights of the `response` loss terms with up to FEW_CLASSES classes and with more: with few classes
# there is mainly the boxes to learn. See docs/experiments.md.
FEW_CLASSES = 10
TERM_WEIGHTS = {"box": (6.0, 1.0), "obj": (3.0, 1.0), "cls": (3.0, 8.0)}


def term_weight(name: str, term: str) -> Any:
    """Return the field for the weight of a `response` loss term; None depends on the number of classes."""
    few, many = TERM_WEIGHTS[name]
    return option(
        None,
        f"response: weight of the {term} term, relative to the gain of the labels' loss; without it "
        f"{few:g} with up to {FEW_CLASSES} classes, else {many:g}",
        limits=at_least(0),
        group=TEACHER,
    )


@dataclass(frozen=True, kw_only=True)
class DistillOptions(TrainOptions):
    """The options of train_distill.py: those of train.py and those for the teacher."""

    teacher: tuple[str, ...] = option(
        (),
        "teacher weights; several are averaged, each class over those that know it; "
        f"{OWN_AVERAGE}: the student's own moving average",
        aliases=("t-weights",),
        group=TEACHER,
    )
    teacher_cfg: str = option(
        "", "model YAML of a teacher whose weight file does not describe its model", group=TEACHER
    )
    teacher_img_size: int = option(
        0,
        "image size of the teacher; 0 is that of the student",
        limits=at_least(0),
        unit="pixels",
        group=TEACHER,
    )
    distill: bool = option(
        True, "learn from the teacher; --no-distill trains plainly, for comparison", group=TEACHER
    )
    distill_loss: Preset | None = option(
        None,
        "output loss: probabilities and boxes where the teacher sees objects (response), its "
        "detections as targets (boxes), or every cell with a loss gated by objectness, squared error or KL; "
        "without it response, or what --soft-loss or --full-output-loss ask for",
        aliases=("dist-loss",),
        group=TEACHER,
    )
    distill_ratio: float | Literal["auto"] = option(
        1.0,
        "weight of the distillation loss; auto adapts it to the gradients",
        limits=at_least(0),
        group=TEACHER,
    )
    auto_ratio: float = option(
        1.0,
        "--distill-ratio auto: gradient norm of distillation to hold, relative to that of the labels' loss",
        limits=above(0),
        group=TEACHER,
    )
    distill_box: float | None = term_weight("box", "box")
    distill_obj: float | None = term_weight("obj", "objectness")
    distill_cls: float | None = term_weight("cls", "class")
    feature_loss: Literal["none", "cwd", "pkd", "score-l2"] = option(
        "none",
        "also distil the inputs of the Detect layer: by channel-wise divergence, correlation, or "
        "squared error weighted by the teacher's scores",
        group=TEACHER,
    )
    feature_ratio: float = option(1.0, "weight of the feature loss", limits=at_least(0), group=TEACHER)
    distill_warmup: float = option(
        0.0,
        "length of a warm-up in which the weight of distillation rises from 0",
        limits=at_least(0),
        unit="epochs",
        group=TEACHER,
    )
    distill_schedule: Literal["constant", "cosine"] = option(
        "constant",
        "weight of distillation after the warm-up: constant, or falling along a cosine",
        group=TEACHER,
    )
    distill_final: float = option(
        0.1, "cosine: fraction of that weight left at the end", limits=between(0, 1), group=TEACHER
    )
    stop_distill: int = option(
        0,
        "number of final epochs without distillation",
        limits=at_least(0),
        unit="epochs",
        group=TEACHER,
    )
    with_gt_loss: bool = option(True, "also learn from the ground-truth labels", group=TEACHER)
    soft_loss: bool = option(
        False, "boxes: compare the classes by KL instead of squared error", group=TEACHER
    )
    full_output_loss: bool = option(False, "same as --distill-loss objectness", group=TEACHER)
    temperature: float = option(
        20.0,
        "kl, and boxes with --soft-loss: temperature of the class probabilities",
        limits=above(0),
        group=TEACHER,
    )
    t_conf_thres: float = option(
        0.25, "boxes: confidence threshold of the teacher's detections", limits=between(0, 1), group=TEACHER
    )
    t_nms_thres: float = option(
        0.45,
        "boxes: NMS threshold of the teacher's detections",
        limits=between(0, 1),
        unit="IoU",
        group=TEACHER,
    )
    unlabeled_share: float | None = option(
        None,
        "fraction of each batch (with --rect of an epoch) taken from the YAML's unlabeled:, where only the "
        "teacher teaches; 0 leaves these images out; without it, each comes once an epoch",
        aliases=("unlabelled-share",),
        limits=between(0, 0.95),
        group=DATA,
    )

    def __post_init__(self) -> None:
        """Resolve the preset, so that `opt.yaml` records it and a resumed run keeps it."""
        super().__post_init__()
        object.__setattr__(self, "distill_loss", self.preset())

    def share_of_unlabelled(self) -> float | None:
        """Return the unlabelled fraction of a batch, 0..1; None if each image comes once per epoch."""
        return self.unlabeled_share if self.distill else 0.0

    def distillation_epochs(self) -> int:
        """Return the number of epochs with distillation, and so with a loss on unlabelled images."""
        return self.epochs - self.stop_distill

    def preset(self) -> Preset:
        """Return the output loss that compares student and teacher."""
        if self.distill_loss is not None:
            return self.distill_loss
        if self.full_output_loss:
            return "objectness"
        return "boxes" if self.soft_loss else "response"

    def contradictions(self) -> Iterator[str]:
        """Yield contradictions between options, as `--option: what is wrong`."""
        yield from super().contradictions()
        trains = self.resume is None and not self.check_data
        if trains and self.distill and not (self.teacher and all(self.teacher)):
            yield "--teacher: missing, name the weights of the network that teaches"
        if self.distill_ratio == "auto" and not self.with_gt_loss:
            yield "--distill-ratio auto: compares with the labels' loss, leave --no-with-gt-loss out"
        if self.share_of_unlabelled() and self.batch_size == 1 and not self.rect:
            yield "--unlabeled-share: a batch of one image has no room for both kinds, raise --batch-size"
        if self.stop_distill >= self.epochs:
            yield f"--stop-distill {self.stop_distill}: leaves nothing to teach in --epochs {self.epochs}"
        if self.stop_distill and not self.with_gt_loss:
            yield "--stop-distill: nothing is left to learn from then, leave --no-with-gt-loss out"
        if not self.with_gt_loss and set(self.teacher) == {OWN_AVERAGE}:
            yield "--teacher ema: has nothing but the labels to learn from, leave --no-with-gt-loss out"
        yield from self._untaught()
        if self.full_output_loss and self.preset() != "objectness":
            yield f"--full-output-loss: means --distill-loss objectness, not {self.preset()}; leave one out"
        if self.soft_loss and self.preset() != "boxes":
            yield f"--soft-loss: belongs to --distill-loss boxes, not {self.preset()}; leave one out"

    def _untaught(self) -> Iterator[str]:
        """Yield what would leave outputs without any loss if the labels are not used, as `--option: why`."""
        if self.with_gt_loss:
            return
        if not self.distill:
            yield "--no-with-gt-loss: nothing is left to learn from with --no-distill"
        elif self.distill_ratio == 0:
            yield "--distill-ratio 0: nothing is left to learn from, leave --no-with-gt-loss out"
        elif self.preset() == "response":
            for name in ("box", "obj", "cls"):
                if getattr(self, f"distill_{name}") == 0:
                    yield f"--distill-{name} 0: nothing would train that output, leave --no-with-gt-loss out"

    def warnings(self) -> Iterator[str]:
        """Yield warnings about options without effect or with an unexpected one."""
        yield from super().warnings()
        given = self.given
        if "unlabeled_share" in given and not self.distill:
            yield "--unlabeled-share has no effect with --no-distill"
        share = (self.unlabeled_share or 0) * self.batch_size
        if 0 < share < 0.5 and not self.rect:
            yield f"--unlabeled-share is one image in each batch of {self.batch_size}, not less"
        yield from self._weight_warnings()
        yield from self._schedule_warnings()
        for name, where in idle_settings(vars(self)).items():
            if name in given:
                yield f"--{name.replace('_', '-')} has no effect {where}"

    def _weight_warnings(self) -> Iterator[str]:
        has_features = self.feature_loss != "none"
        if self.distill and self.distill_ratio == 0:
            alone = "; for features alone: --distill-box 0 --distill-obj 0 --distill-cls 0"
            yield f"--distill-ratio 0 leaves the teacher without any effect{alone if has_features else ''}"
        if has_features and self.feature_ratio == 0:
            yield "--feature-loss has no effect with --feature-ratio 0"

    def _schedule_warnings(self) -> Iterator[str]:
        taught = self.distillation_epochs()
        if self.distill_warmup > taught and self.resume is None:
            yield f"--distill-warmup {self.distill_warmup:g} is never over: the teacher has {taught} epochs"


def idle_settings(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of distillation without effect beside the others, with the reason for each.

    values: the options by name, `distill_loss` resolved.
    """
    preset = values["distill_loss"]
    other = f"with --distill-loss {preset}"
    idle: dict[str, str] = {}
    if preset != "response":
        idle |= dict.fromkeys(("distill_box", "distill_cls", "distill_obj"), other)
    if preset != "boxes":
        idle |= dict.fromkeys(("t_conf_thres", "t_nms_thres"), other)
    if preset != "kl" and not values["soft_loss"]:
        idle["temperature"] = other
    if values["feature_loss"] == "none":
        idle["feature_ratio"] = "without --feature-loss, unless no class is shared"
    if values["distill_ratio"] != "auto":
        idle["auto_ratio"] = "without --distill-ratio auto"
    if values["distill_schedule"] != "cosine":
        idle["distill_final"] = "without --distill-schedule cosine"
    return idle
