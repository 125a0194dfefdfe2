"""The experiments by name: what is trained, on which data, with which teacher.

All arms of a plan share initial weights, data, schedule and evaluation; they differ only in their own
options.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Arm:
    """One training variant: its title in the table and its options in addition to the plan's.

    teacher: name of the teacher in `TEACHERS`, None for plain training. data: a dataset instead of the
    plan's. ablation: the weakness put back, see `experiments.ablation`. epochs: instead of the plan's, for
    the same number of updates with fewer images.
    """

    name: str
    title: str
    options: tuple[str, ...] = ()
    teacher: str | None = None
    data: str | None = None
    ablation: str | None = None
    epochs: int | None = None


@dataclass(frozen=True)
class TeacherRun:
    """A teacher, trained once with seed 0, or used as it is if `options` is empty."""

    title: str
    weights: str
    options: tuple[str, ...] = ()
    data: str = "data/bccd.yaml"


@dataclass(frozen=True)
class Plan:
    """Arms to compare.

    start: options for the student's initial weights. split: scored at the end, not used for training or
    model selection. choice: `best` selects the epoch on the validation split, `last` takes the last one
    (used if `split` is the validation split). reference: the arm that the others are compared with.
    target: the arm that represents the achievable score, None for each arm's teacher.
    """

    title: str
    data: str
    image_size: int
    epochs: int
    start: tuple[str, ...]
    arms: tuple[Arm, ...]
    seeds: int = 3
    split: str = "test"
    choice: str = "best"
    reference: str = "plain"
    target: str | None = None
    common: tuple[str, ...] = ()


SMALL_SET = ("--hyp", "experiments/data/hyp.small-set.yaml")
FINE = ("--hyp", "experiments/data/hyp.fine.yaml")
# The plans on VOC320 up to *voc320-full*, and their teachers, start with a new head, as YOLOv5 does.
NEW_HEAD = ("--no-head-by-name",)
TEACHERS = {
    "bccd-s": TeacherRun(
        "yolov5s, public COCO weights, 50 epochs on BCCD", "yolov5s.pt", ("--img", "320", "--epochs", "50")
    ),
    "bccd-s-fifth": TeacherRun(
        "yolov5s, public COCO weights, 100 epochs on a fifth of the labels",
        "yolov5s.pt",
        ("--img", "320", "--epochs", "100", "--patience", "0", "--noval", *SMALL_SET),
        "experiments/data/bccd_fifth.yaml",
    ),
    "voc-s": TeacherRun(
        "yolov5s, public COCO weights, 8 epochs on VOC320",
        "yolov5s.pt",
        ("--img", "224", "--epochs", "8", *NEW_HEAD),
        "experiments/data/voc320.yaml",
    ),
    "voc-s-fine": TeacherRun(
        "yolov5s, public COCO weights, 10 epochs on VOC320 at a quarter of the learning rate",
        "yolov5s.pt",
        ("--img", "224", "--epochs", "10", "--patience", "0", "--noval", *FINE, *NEW_HEAD),
        "experiments/data/voc320.yaml",
    ),
    "voc-s-320": TeacherRun(
        "yolov5s, public COCO weights, 8 epochs on VOC320 at 320 px",
        "yolov5s.pt",
        ("--img", "320", "--epochs", "8", "--patience", "0", "--noval", *NEW_HEAD),
        "experiments/data/voc320.yaml",
    ),
    "coco-s": TeacherRun(
        "yolov5s, public COCO weights as they are", "yolov5s.pt", data="experiments/data/voc320.yaml"
    ),
}

PLAIN = Arm("plain", "plain training")
RESPONSE = ("--distill-loss", "response")
# The default weights for up to ten classes, and those for more. The runs predate this distinction.
BOXES = (*RESPONSE, "--distill-box", "6", "--distill-obj", "3", "--distill-cls", "3")
CLASSES = (*RESPONSE, "--distill-box", "1", "--distill-obj", "1", "--distill-cls", "8")
BOTH = (*RESPONSE, "--distill-box", "6", "--distill-obj", "3", "--distill-cls", "24")
FEATURES_ALONE = (*RESPONSE, "--distill-box", "0", "--distill-obj", "0", "--distill-cls", "0")


def other_presets(teacher: str) -> tuple[Arm, ...]:
    """Return the presets besides `response`."""
    named = {
        "boxes": ("`boxes`", ("boxes",)),
        "boxes-soft": ("`boxes --soft-loss`", ("boxes", "--soft-loss")),
        "objectness": ("`objectness`", ("objectness",)),
        "l2": ("`l2`", ("l2",)),
        "kl": ("`kl`", ("kl",)),
    }
    return tuple(
        Arm(name, title, ("--distill-loss", *options), teacher) for name, (title, options) in named.items()
    )


def presets(teacher: str, boxes_first: bool = False) -> tuple[Arm, ...]:
    """Return plain training, each preset, and `response` with the weights for few and for many classes.

    Each feature loss is combined with the latter and, with `boxes_first`, also with the former; without it
    only cwd is.
    """

    def distilled(name: str, title: str, *options: str) -> Arm:
        return Arm(name, title, options, teacher)

    def featured(name: str, title: str, *options: str) -> tuple[Arm, ...]:
        """Return the arm without a feature loss and with each of them."""
        losses = (("cwd", "cwd"), ("pkd", "pkd"), ("score", "score-l2"))
        beside = [
            distilled(f"{name}-{short}", f"{title}, features by {loss}", *options, "--feature-loss", loss)
            for short, loss in losses
        ]
        return (distilled(name, title, *options), *beside)

    arms = (PLAIN, *other_presets(teacher))
    classes = "`response`, classes first (1, 1, 8)"
    if not boxes_first:
        usual = "`response` (the default)"
        default = (
            distilled("boxes-first", usual, *BOXES),
            distilled("boxes-first-cwd", f"{usual}, features by cwd", *BOXES, "--feature-loss", "cwd"),
        )
        return (*arms, *default, *featured("response", classes, *CLASSES))
    default = featured("response", "`response` (the default)", *BOXES)
    return (*arms, *default, *featured("default", classes, *CLASSES))


def few_labels() -> tuple[Arm, ...]:
    """Return arms with only a fifth of the labels, with all labels, and with the other images unlabelled.

    41 images are 3 batches, 205 are 13: the arm with only the labelled ones has 130 epochs instead of 30.
    """
    fifth = "experiments/data/bccd_fifth.yaml"
    return (
        Arm("plain", "plain, 20% of the labels", data=fifth, epochs=130),
        Arm("all", "plain, all labels", data="data/bccd.yaml"),
        Arm("own", "the rest unlabelled, teacher of the same 20%", BOXES, "bccd-s-fifth", fifth),
        Arm("good", "the rest unlabelled, teacher of all labels", BOXES, "bccd-s", fifth),
    )


def ablations() -> tuple[Arm, ...]:
    """Return the response loss, and its variants with each weakness of other implementations."""
    weaknesses = {
        "training-mode": "teacher in training mode",
        "all-cells": "mean over all cells",
        "softmax": "classes by KL of softmax, T = 20",
        "gated": "objectness gated by the teacher's",
        "raw-boxes": "squared error of raw boxes",
    }
    broken = [Arm(name, title, BOXES, "bccd-s", ablation=name) for name, title in weaknesses.items()]
    return (PLAIN, Arm("response", "`response`", BOXES, "bccd-s"), *broken)


def gains() -> tuple[Arm, ...]:
    """Return the response loss with different weights of its three terms."""
    arms = [PLAIN]
    for box, obj, cls in ((6, 3, 3), (6, 3, 24), (1, 1, 8), (2, 1, 8)):
        words = f"--distill-box {box} --distill-obj {obj} --distill-cls {cls}"
        options = (*RESPONSE, *words.split())
        arms.append(Arm(f"{box}-{obj}-{cls}", f"`{words}`", options, "voc-s"))
    return tuple(arms)


def long_runs(teacher: str) -> tuple[Arm, ...]:
    """Return plain training, the default, and variants whose gain may last longer than the default's."""
    return (
        PLAIN,
        Arm("response", "`response`", RESPONSE, teacher),
        Arm("cosine", "`--distill-schedule cosine`", (*RESPONSE, "--distill-schedule", "cosine"), teacher),
        Arm("boxes-first", "`response`, boxes first (6, 3, 3)", BOXES, teacher),
        Arm("response-cwd", "`response`, features by cwd", (*RESPONSE, "--feature-loss", "cwd"), teacher),
        Arm("cwd", "features by cwd alone", (*FEATURES_ALONE, "--feature-loss", "cwd"), teacher),
    )


def usual_runs(teacher: str) -> tuple[Arm, ...]:
    """Return plain training, each preset, and the default with other weights, schedules and with features."""
    plain, *variants = long_runs(teacher)
    ratios = (
        Arm(
            f"ratio-{name}",
            f"`response`, `--distill-ratio {ratio}`",
            (*RESPONSE, "--distill-ratio", ratio),
            teacher,
        )
        for name, ratio in (("half", ".5"), ("2", "2"))
    )
    return (plain, *other_presets(teacher), *variants, *ratios)


def knowing(image_size: int) -> tuple[Arm, ...]:
    """Return `long_runs` with the public yolov5s as teacher, and further variants that may gain more from it.

    image_size: of the plan; a teacher with images of twice the size shares two levels with the student.
    """
    larger = str(2 * image_size)

    def taught(name: str, title: str, *options: str) -> Arm:
        return Arm(name, title, (*RESPONSE, *options), "coco-s")

    return (
        *long_runs("coco-s"),
        Arm(
            "boxes-first-cwd",
            "`response`, boxes first (6, 3, 3), features by cwd",
            (*BOXES, "--feature-loss", "cwd"),
            "coco-s",
        ),
        Arm("boxes-classes-first", "`response`, boxes and classes first (6, 3, 24)", BOTH, "coco-s"),
        taught("ratio-2", "`response`, `--distill-ratio 2`", "--distill-ratio", "2"),
        taught("ratio-4", "`response`, `--distill-ratio 4`", "--distill-ratio", "4"),
        taught("larger-view", f"`response`, `--teacher-img-size {larger}`", "--teacher-img-size", larger),
        taught("no-labels", "`response`, `--no-with-gt-loss`", "--no-with-gt-loss"),
        Arm("plain-fast", "plain, at the full learning rate", SMALL_SET),
        taught("response-fast", "`response`, at the full learning rate", *SMALL_SET),
    )


SCRATCH = ("--weights", "", "--cfg", "models/yolov5n.yaml")
PUBLIC = ("--weights", "yolov5n.pt")
PLANS = {
    "bccd-scratch": Plan(
        "BCCD, yolov5n from scratch, 60 epochs",
        "data/bccd.yaml",
        320,
        60,
        SCRATCH,
        presets("bccd-s", boxes_first=True),
        common=SMALL_SET,
    ),
    "bccd-public": Plan(
        "BCCD, yolov5n from the public COCO weights, 30 epochs",
        "data/bccd.yaml",
        320,
        30,
        PUBLIC,
        presets("bccd-s", boxes_first=True),
        common=SMALL_SET,
    ),
    "voc320": Plan(
        "VOC320, yolov5n from the public COCO weights, 6 epochs at 224 px",
        "experiments/data/voc320.yaml",
        224,
        6,
        (*PUBLIC, *NEW_HEAD),
        (PLAIN, Arm("response", "`response`", RESPONSE, "voc-s")),
        split="val",
        choice="last",
        common=SMALL_SET,
    ),
    "voc320-long": Plan(
        "VOC320, yolov5n from the public COCO weights, 12 epochs at 224 px",
        "experiments/data/voc320.yaml",
        224,
        12,
        (*PUBLIC, *NEW_HEAD),
        (
            *long_runs("voc-s-fine"),
            Arm("coco", "`response`, the public yolov5s as it is", RESPONSE, "coco-s"),
        ),
        split="val",
        choice="last",
        common=(*SMALL_SET, "--noval"),
    ),
    "voc320-full": Plan(
        "VOC320, yolov5n from the public COCO weights, 15 epochs at 320 px, on a GPU",
        "experiments/data/voc320.yaml",
        320,
        15,
        (*PUBLIC, *NEW_HEAD),
        (PLAIN, Arm("response", "`response`", RESPONSE, "voc-s-320")),
        split="val",
        choice="last",
        common=(*SMALL_SET, "--noval"),
    ),
    "voc320-known": Plan(
        "VOC320, yolov5n from the public COCO weights with what its head knows, 12 epochs at 224 px",
        "experiments/data/voc320.yaml",
        224,
        12,
        PUBLIC,
        knowing(224),
        split="val",
        choice="last",
        common=(*FINE, "--noval"),
    ),
    "voc320-usual": Plan(
        "VOC320, yolov5n with a new head, default hyperparameters, 8 epochs at 224 px",
        "experiments/data/voc320.yaml",
        224,
        8,
        (*PUBLIC, *NEW_HEAD),
        usual_runs("coco-s"),
        split="val",
        choice="last",
        common=("--noval",),
    ),
    "few-labels": Plan(
        "BCCD, a fifth of the labels, the other images unlabelled; yolov5n from the public COCO weights",
        "experiments/data/bccd_fifth.yaml",
        320,
        30,
        PUBLIC,
        few_labels(),
        choice="last",
        target="all",
        common=(*SMALL_SET, "--noval"),
    ),
    "ablation": Plan(
        "BCCD, yolov5n from scratch, 30 epochs: one cause of a weak distillation put back at a time",
        "data/bccd.yaml",
        320,
        30,
        SCRATCH,
        ablations(),
        common=SMALL_SET,
    ),
    "gains": Plan(
        "VOC320, yolov5n from the public COCO weights, 6 epochs at 224 px: the weights of the three terms",
        "experiments/data/voc320.yaml",
        224,
        6,
        (*PUBLIC, *NEW_HEAD),
        gains(),
        seeds=1,
        split="val",
        choice="last",
        common=SMALL_SET,
    ),
    "demo": Plan(
        "The generated set, from the demo student's start, 10 epochs",
        "data/demo.yaml",
        320,
        10,
        ("--weights", "weights/demo_student.pt"),
        presets("demo"),
        common=("--optimizer", "AdamW", "--hyp", "data/hyp.demo.yaml"),
    ),
}
TEACHERS["demo"] = TeacherRun("the demo's teacher", "weights/demo_teacher.pt", data="data/demo.yaml")
PLANS["voc320-usual-long"] = replace(
    PLANS["voc320-usual"],
    title="VOC320, yolov5n with a new head, default hyperparameters, 24 epochs at 224 px",
    epochs=24,
)
PLANS["voc320-known-gpu"] = replace(
    PLANS["voc320-known"],
    title="VOC320, yolov5n with what the head of its public weights knows, 30 epochs at 320 px, on a GPU",
    image_size=320,
    epochs=30,
    arms=knowing(320),
)
PLANS["bccd-scratch-gpu"] = replace(
    PLANS["bccd-scratch"], title="BCCD, yolov5n from scratch, 60 epochs, on a GPU"
)
