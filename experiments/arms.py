"""The arms of the experiments: what differs between the runs of one plan."""

from __future__ import annotations

from dataclasses import dataclass


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


SMALL_SET = ("--hyp", "experiments/data/hyp.small-set.yaml")
FINE = ("--hyp", "experiments/data/hyp.fine.yaml")

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
    usual = "`response` (the default)"
    if boxes_first:
        default = featured("response", usual, *BOXES)
        return (*arms, *default, *featured("default", classes, *CLASSES))
    default = featured("boxes-first", usual, *BOXES)[:2]
    return (*arms, *default, *featured("response", classes, *CLASSES))


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


def ablations(teacher: str, options: tuple[str, ...]) -> tuple[Arm, ...]:
    """Return the response loss, its variants with each weakness of other implementations, and all at once.

    options: of the response loss. The last arm is the loss of the first scripts with their usual ratio.
    """
    weaknesses = {
        "training-mode": "teacher in training mode",
        "all-cells": "mean over all cells",
        "softmax": "classes by KL of softmax, T = 20",
        "gated": "objectness gated by the teacher's",
        "raw-boxes": "squared error of raw boxes",
    }
    broken = [Arm(name, title, options, teacher, ablation=name) for name, title in weaknesses.items()]
    first = Arm(
        "first-scripts",
        "all at once: `kl`, ratio .001, teacher in training mode",
        ("--distill-loss", "kl", "--distill-ratio", ".001"),
        teacher,
        ablation="training-mode",
    )
    return (PLAIN, Arm("response", "`response`", options, teacher), *broken, first)


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


def with_ratio(name: str, ratio: str, teacher: str) -> Arm:
    """Return the response loss with another weight."""
    title = f"`response`, `--distill-ratio {ratio}`"
    return Arm(f"ratio-{name}", title, (*RESPONSE, "--distill-ratio", ratio), teacher)


def usual_runs(teacher: str) -> tuple[Arm, ...]:
    """Return plain training, each preset, and the default with other weights, schedules and with features."""
    plain, *variants = long_runs(teacher)
    ratios = (with_ratio("half", ".5", teacher), with_ratio("2", "2", teacher))
    # The run of `boxes` warns of the teacher's gradient and suggests these two.
    advised = tuple(
        Arm(
            f"boxes-{name}",
            f"`boxes`, `--distill-ratio {ratio}`",
            ("--distill-loss", "boxes", "--distill-ratio", ratio),
            teacher,
        )
        for name, ratio in (("advised", ".08"), ("auto", "auto"))
    )
    factor = Arm(
        "constant-factor",
        "`response`, no gradient through the factor of its cross-entropies",
        RESPONSE,
        teacher,
        ablation="constant-factor",
    )
    return (plain, *other_presets(teacher), *advised, *variants, *ratios, factor)


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
        with_ratio("2", "2", "coco-s"),
        with_ratio("4", "4", "coco-s"),
        taught("larger-view", f"`response`, `--teacher-img-size {larger}`", "--teacher-img-size", larger),
        taught("no-labels", "`response`, `--no-with-gt-loss`", "--no-with-gt-loss"),
        Arm("plain-fast", "plain, at the full learning rate", SMALL_SET),
        taught("response-fast", "`response`, at the full learning rate", *SMALL_SET),
    )
