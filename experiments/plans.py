"""The experiments by name: what is trained, on which data, with which teacher.

All arms of a plan share initial weights, data, schedule and evaluation; they differ only in their own
options.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from experiments.arms import (
    BOXES,
    FINE,
    PLAIN,
    RESPONSE,
    SMALL_SET,
    Arm,
    ablations,
    few_labels,
    gains,
    knowing,
    long_runs,
    presets,
    usual_runs,
)


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
    "demo": TeacherRun("the demo's teacher", "weights/demo_teacher.pt", data="data/demo.yaml"),
}

SCRATCH = ("--weights", "", "--cfg", "models/yolov5n.yaml")
PUBLIC = ("--weights", "yolov5n.pt")
BCCD = Plan(
    "BCCD, yolov5n from scratch, 60 epochs",
    "data/bccd.yaml",
    320,
    60,
    SCRATCH,
    presets("bccd-s", boxes_first=True),
    common=SMALL_SET,
)
VOC = Plan(
    "VOC320, yolov5n from the public COCO weights, 6 epochs at 224 px",
    "experiments/data/voc320.yaml",
    224,
    6,
    (*PUBLIC, *NEW_HEAD),
    (PLAIN, Arm("response", "`response`", RESPONSE, "voc-s")),
    split="val",
    choice="last",
    common=SMALL_SET,
)
VOC_KNOWN = replace(
    VOC,
    title="VOC320, yolov5n from the public COCO weights with what its head knows, 12 epochs at 224 px",
    epochs=12,
    start=PUBLIC,
    arms=knowing(224),
    common=(*FINE, "--noval"),
)
VOC_USUAL = replace(
    VOC,
    title="VOC320, yolov5n with a new head, default hyperparameters, 8 epochs at 224 px",
    epochs=8,
    arms=usual_runs("coco-s"),
    common=("--noval",),
)
PLANS = {
    "bccd-scratch": BCCD,
    "bccd-public": replace(
        BCCD, title="BCCD, yolov5n from the public COCO weights, 30 epochs", epochs=30, start=PUBLIC
    ),
    "bccd-scratch-gpu": replace(BCCD, title=f"{BCCD.title}, on a GPU"),
    "voc320": VOC,
    "voc320-long": replace(
        VOC,
        title="VOC320, yolov5n from the public COCO weights, 12 epochs at 224 px",
        epochs=12,
        arms=(
            *long_runs("voc-s-fine"),
            Arm("coco", "`response`, the public yolov5s as it is", RESPONSE, "coco-s"),
        ),
        common=(*SMALL_SET, "--noval"),
    ),
    "voc320-full": replace(
        VOC,
        title="VOC320, yolov5n from the public COCO weights, 15 epochs at 320 px, on a GPU",
        image_size=320,
        epochs=15,
        arms=(PLAIN, Arm("response", "`response`", RESPONSE, "voc-s-320")),
        common=(*SMALL_SET, "--noval"),
    ),
    "voc320-known": VOC_KNOWN,
    "voc320-known-gpu": replace(
        VOC_KNOWN,
        title="VOC320, yolov5n with what the head of its public weights knows, 30 epochs at 320 px, on a GPU",
        image_size=320,
        epochs=30,
        arms=knowing(320),
    ),
    "voc320-default": replace(
        VOC_USUAL,
        title="VOC320, yolov5n from the public COCO weights, default options, 8 epochs at 224 px",
        start=PUBLIC,
    ),
    "voc320-usual": VOC_USUAL,
    "voc320-usual-long": replace(
        VOC_USUAL,
        title="VOC320, yolov5n with a new head, default hyperparameters, 24 epochs at 224 px",
        epochs=24,
    ),
    "few-labels": replace(
        BCCD,
        title="BCCD, a fifth of the labels, the other images unlabelled; yolov5n from public weights",
        data="experiments/data/bccd_fifth.yaml",
        epochs=30,
        start=PUBLIC,
        arms=few_labels(),
        choice="last",
        target="all",
        common=(*SMALL_SET, "--noval"),
    ),
    "ablation": replace(
        BCCD,
        title="BCCD, yolov5n from scratch, 30 epochs: one cause of a weak distillation put back at a time",
        epochs=30,
        arms=ablations("bccd-s", BOXES),
    ),
    "ablation-voc": replace(
        VOC_USUAL,
        title=f"{VOC_USUAL.title}: one cause of a weak distillation put back at a time",
        arms=ablations("coco-s", RESPONSE),
    ),
    "gains": replace(VOC, title=f"{VOC.title}: the weights of the three terms", arms=gains(), seeds=1),
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
