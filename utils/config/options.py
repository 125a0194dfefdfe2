"""The options of the scripts, each declared once: name, type, default, range, unit and help.

Parsing, `--help`, the README's tables, `opt.yaml` and all checks follow from the fields. Values that
contradict each other are found when an options object is made, before any work starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from utils.config.hyperparameters import remarks_on
from utils.config.options_base import (
    DATA,
    LEARNING,
    LENGTH,
    MACHINE,
    MODEL,
    RESULTS,
    TEACHER,
    Options,
    RunOptions,
    image_size,
    loader_workers,
    may_fetch,
    options_from_dict,
    options_to_dict,
    rehearsal,
    run_folders,
)
from utils.config.options_compare import CompareOptions
from utils.config.options_export import ExportOptions
from utils.config.options_inference import DetectOptions, TestOptions
from utils.config.schema import yaml_text
from utils.config.settings import above, at_least, between, option, settings_of

__all__ = [
    "CHANGEABLE_ON_RESUME",
    "PRESETS",
    "CompareOptions",
    "DetectOptions",
    "DistillOptions",
    "ExportOptions",
    "Options",
    "Preset",
    "TestOptions",
    "TrainOptions",
    "options_from_dict",
    "options_to_dict",
    "yaml_text",
]

OWN_AVERAGE = "ema"  # as a teacher
Preset = Literal["response", "boxes", "objectness", "l2", "kl"]
PRESETS: tuple[str, ...] = get_args(Preset)
# What may be given anew when a run goes on; everything else is as it was when it began.
CHANGEABLE_ON_RESUME = frozenset(
    {
        *("epochs", "device", "workers", "patience", "noplots", "nosave", "cache", "save_period", "project"),
        "compile",
        # Where things lie now: that they are still the same is seen to.
        *("save_every_steps", "data", "data_dir", "teacher", "logger", "evolve", "download"),
    }
)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    """The options of train.py."""

    weights: str = option("yolov5s.pt", "weights to start from; '' starts from scratch", group=MODEL)
    cfg: str = option("", "network YAML; left out, the network inside the weights is taken", group=MODEL)
    freeze: tuple[int, ...] = option(
        (),
        "layers that do not learn: one number N for the first N, several for these",
        limits=at_least(0),
        group=MODEL,
    )
    data: Path = option(Path("data/coco128.yaml"), "dataset YAML", group=DATA)
    data_dir: Path | None = option(None, "folder with the data, in place of the YAML's path", group=DATA)
    download: bool = may_fetch("data and public weights")
    check_data: bool = option(
        False,
        "only look at every picture and label, list all that is wrong, exit with 1 where anything is",
        group=DATA,
    )
    imgsz: int = image_size(640, "side of the square training pictures")
    rect: bool = option(False, "batches of equal aspect instead of squares; no mosaics", group=DATA)
    cache: Literal["ram", "disk"] | None = option(
        None,
        "keep decoded pictures in memory or in the user's cache folder; alone, ram",
        aliases=("cache-images",),
        bare="ram",
        group=DATA,
    )
    image_weights: bool = option(False, "show pictures with badly scored classes more often", group=DATA)
    single_cls: bool = option(False, "treat all classes as one", group=DATA)
    multi_scale: bool = option(
        False, "vary the picture side from half to one and a half of --imgsz", group=DATA
    )
    epochs: int = option(100, "passes over the training split", limits=at_least(1), group=LENGTH)
    patience: int = option(
        100,
        "stop after so many epochs without a better score; 0 never stops",
        limits=at_least(0),
        unit="epochs",
        group=LENGTH,
    )
    resume: str | None = option(
        None,
        "go on with a run: its folder or its last.pt; alone, the newest under --project",
        bare="",
        group=LENGTH,
    )
    hyp: Path = option(Path("data/hyp.scratch.yaml"), "hyperparameter YAML", group=LEARNING)
    evolve: int | None = option(
        None,
        "look for better hyperparameters over so many short runs in all; alone, 300; goes on with what "
        "is in runs/evolve/NAME (or --project)",
        bare=300,
        limits=at_least(1),
        unit="runs",
        group=LEARNING,
    )
    batch_size: int = option(
        16, "pictures in a batch", aliases=("batch",), limits=at_least(1), group=LEARNING
    )
    optimizer: Literal["SGD", "Adam", "AdamW"] = option("SGD", "rule that moves the weights", group=LEARNING)
    cos_lr: bool = option(
        False, "let the learning rate fall along a cosine instead of a line", group=LEARNING
    )
    close_mosaic: int = option(
        0, "leave mosaics out of so many epochs at the end", limits=at_least(0), unit="epochs", group=LEARNING
    )
    label_smoothing: float = option(
        0.0,
        "eps of the class targets; 0 takes the hyperparameter of that name",
        limits=between(0, 1),
        group=LEARNING,
    )
    noautoanchor: bool = option(
        False, "keep the anchors even where they fit the labels badly", group=LEARNING
    )
    seed: int = option(
        0,
        "of everything random; a run with the same one repeats",
        limits=between(0, 2**32 - 1),
        group=LEARNING,
    )
    workers: int = loader_workers()
    amp: bool = option(True, "compute in reduced precision, see --amp-dtype", group=MACHINE)
    amp_dtype: Literal["auto", "fp16", "bf16"] = option(
        "auto",
        "that precision; auto is bf16 or fp16, as the GPU can, and none on a CPU: there bf16, where it has "
        "AMX or AVX512-BF16, trains up to twice as fast",
        group=MACHINE,
    )
    compile: bool = option(
        False,
        "let torch.compile make kernels of the networks: minutes at the start, then shorter steps; needs a "
        "C++ compiler",
        group=MACHINE,
    )
    cuda_graphs: bool = option(True, "launch a network's kernels together on a GPU", group=MACHINE)
    sync_bn: bool = option(
        False, "let batch norms count over the GPUs of all processes that torchrun starts", group=MACHINE
    )
    project: Path = run_folders("runs/train")
    nosave: bool = option(False, "write weights after the last epoch only", group=RESULTS)
    noval: bool = option(False, "score after the last epoch only", group=RESULTS)
    save_every_steps: int = option(
        0,
        "also write what --resume needs every so many batches; 0 writes it after each epoch",
        limits=at_least(0),
        unit="batches",
        group=RESULTS,
    )
    noplots: bool = option(False, "leave out all pictures and charts", group=RESULTS)
    logger: tuple[Literal["tensorboard", "wandb"], ...] = option(
        (), "also log to these, where they are installed; results.csv is written always", group=RESULTS
    )
    save_period: int = option(
        -1,
        "also keep the weights of every so many epochs; -1 keeps none",
        limits=at_least(-1),
        unit="epochs",
        group=RESULTS,
    )
    dry_run: bool = rehearsal("build everything, try a few batches, say what time and memory a run takes")

    def share_of_unlabelled(self) -> float | None:
        """The part of a batch that is unlabelled, 0..1; None: as in the data, each picture once an epoch.

        Labels alone have nothing to say about a picture without any.
        """
        return 0.0

    def contradictions(self) -> Iterator[str]:
        """What cannot be meant, each as `--option: what is wrong`."""
        yield from super().contradictions()
        if self.resume is not None:
            settings = settings_of(type(self))
            for name in sorted(self.given - CHANGEABLE_ON_RESUME - {"resume"}):
                yield f"{settings[name].flag}: cannot change when a run goes on, leave it out"
            return
        if not self.weights and not self.cfg:
            yield "--weights '': nothing to train, name a network too as in --cfg models/yolov5s.yaml"
        if self.rect and self.image_weights:
            yield "--image-weights: draws pictures at random and --rect orders them, leave one out"
        if self.noval and self.image_weights and self.evolve is None:
            yield "--image-weights: needs the scores of each epoch, leave --noval out"

    def remarks(self) -> Iterator[str]:
        """What was given and has no effect, each as `--option: why`."""
        if self.resume is None:
            yield from remarks_on(self.hyp)
        if "amp_dtype" in self.given and not self.amp:
            yield "--amp-dtype has no effect with --no-amp"
        if self.noval and "patience" in self.given:
            yield "--patience has no effect with --noval"
        if self.rect and self.close_mosaic:
            yield "--close-mosaic has no effect with --rect, which makes none"
        if self.nosave and self.save_period > 0:
            yield "--save-period has no effect with --nosave"
        if self.evolve is not None:
            unused = {"exist_ok", "noval", "nosave", "save_period", "logger"}
            unused |= set() if self.image_weights else {"patience"}  # without scores nothing is waited for
            for name in sorted(self.given & unused):
                yield f"--{name.replace('_', '-')} has no effect with --evolve"


@dataclass(frozen=True, kw_only=True)
class DistillOptions(TrainOptions):
    """The options of train_distill.py: those of train.py and the teacher's."""

    teacher: tuple[str, ...] = option(
        (),
        f"weights of the network that teaches; of several the mean; {OWN_AVERAGE}: the student's own average",
        aliases=("t-weights",),
        group=TEACHER,
    )
    teacher_cfg: str = option("", "network YAML of a teacher whose file does not describe it", group=TEACHER)
    teacher_img_size: int = option(
        0,
        "side of the teacher's pictures; 0 is that of the student's",
        limits=at_least(0),
        unit="pixels",
        group=TEACHER,
    )
    distill: bool = option(
        True, "learn from the teacher; --no-distill trains plainly, to compare", group=TEACHER
    )
    distill_loss: Preset | None = option(
        None,
        "how outputs are compared: probabilities and boxes where the teacher sees objects (response), "
        "the teacher's boxes as targets, or every cell with gated objectness, squared error or KL; left "
        "out it is response, or what --soft-loss or --full-output-loss ask for",
        aliases=("dist-loss",),
        group=TEACHER,
    )
    distill_ratio: float | Literal["auto"] = option(
        1.0, "weight of the distillation loss; auto follows the gradients", limits=at_least(0), group=TEACHER
    )
    auto_ratio: float = option(
        1.0,
        "--distill-ratio auto: strength to hold of the teacher's gradient, relative to that of the labels",
        limits=above(0),
        group=TEACHER,
    )
    distill_box: float = option(
        1.0, "response: box term, relative to the labels' gain", limits=at_least(0), group=TEACHER
    )
    distill_obj: float = option(
        1.0, "response: objectness term, relative to the labels' gain", limits=at_least(0), group=TEACHER
    )
    distill_cls: float = option(
        8.0, "response: class term, relative to the labels' gain", limits=at_least(0), group=TEACHER
    )
    feature_loss: Literal["none", "cwd", "pkd", "score-l2"] = option(
        "none",
        "also compare what the Detect layers see: channel-wise divergence, correlation, squared "
        "error weighted by the teacher's scores",
        group=TEACHER,
    )
    feature_ratio: float = option(1.0, "weight of that comparison", limits=at_least(0), group=TEACHER)
    distill_warmup: float = option(
        0.0,
        "let the weight of all that the teacher says rise from 0 for so long",
        limits=at_least(0),
        unit="epochs",
        group=TEACHER,
    )
    distill_schedule: Literal["constant", "cosine"] = option(
        "constant", "of that weight after the warm-up: as it is, or falling along a cosine", group=TEACHER
    )
    distill_final: float = option(
        0.1, "cosine: part of the weight that is left at the end", limits=between(0, 1), group=TEACHER
    )
    stop_distill: int = option(
        0,
        "leave the teacher out of so many epochs at the end",
        limits=at_least(0),
        unit="epochs",
        group=TEACHER,
    )
    with_gt_loss: bool = option(True, "learn from the labels too", group=TEACHER)
    soft_loss: bool = option(
        False, "boxes: compare the classes by KL instead of squared error", group=TEACHER
    )
    full_output_loss: bool = option(False, "the same as --distill-loss objectness", group=TEACHER)
    temperature: float = option(
        20.0, "kl, and boxes with --soft-loss: softens the class scores", limits=above(0), group=TEACHER
    )
    t_conf_thres: float = option(
        0.25, "boxes: least confidence of a teacher's box", limits=between(0, 1), group=TEACHER
    )
    t_nms_thres: float = option(
        0.45, "boxes: largest overlap of two teacher's boxes", limits=between(0, 1), unit="IoU", group=TEACHER
    )
    unlabeled_share: float | None = option(
        None,
        "part of each batch that comes from the YAML's unlabeled:, for the teacher alone; 0 leaves these "
        "pictures out; left out, each comes once an epoch",
        aliases=("unlabelled-share",),
        limits=between(0, 0.95),
        group=DATA,
    )

    def __post_init__(self) -> None:
        """Settles the preset, so that `opt.yaml` tells it and a resumed run keeps it."""
        super().__post_init__()
        object.__setattr__(self, "distill_loss", self.preset())

    def share_of_unlabelled(self) -> float | None:
        """The part of a batch that is unlabelled, 0..1; None: as in the data, each picture once an epoch."""
        return self.unlabeled_share if self.distill else 0.0

    def preset(self) -> Preset:
        """How student and teacher are compared."""
        if self.distill_loss is not None:
            return self.distill_loss
        if self.full_output_loss:
            return "objectness"
        return "boxes" if self.soft_loss else "response"

    def contradictions(self) -> Iterator[str]:
        """What cannot be meant, each as `--option: what is wrong`."""
        yield from super().contradictions()
        trains = self.resume is None and not self.check_data
        if trains and self.distill and not (self.teacher and all(self.teacher)):
            yield "--teacher: missing, name the weights of the network that teaches"
        if self.distill_ratio == "auto" and not self.with_gt_loss:
            yield "--distill-ratio auto: compares with the labels' loss, leave --no-with-gt-loss out"
        if self.share_of_unlabelled() and self.batch_size == 1 and not self.rect:
            yield "--unlabeled-share: a batch of one picture has no room for both kinds, raise --batch-size"
        if self.stop_distill >= self.epochs:
            yield f"--stop-distill {self.stop_distill}: leaves nothing to teach in {self.epochs} epochs"
        if self.stop_distill and not self.with_gt_loss:
            yield "--stop-distill: nothing is left to learn from then, leave --no-with-gt-loss out"
        if not self.with_gt_loss and set(self.teacher) == {OWN_AVERAGE}:
            yield "--teacher ema: has nothing but the labels to learn from, leave --no-with-gt-loss out"
        if not self.distill and not self.with_gt_loss:
            yield "--no-with-gt-loss: nothing is left to learn from with --no-distill"
        if self.full_output_loss and self.preset() != "objectness":
            yield f"--full-output-loss: means --distill-loss objectness, not {self.preset()}; leave one out"
        if self.soft_loss and self.preset() != "boxes":
            yield f"--soft-loss: belongs to --distill-loss boxes, not {self.preset()}; leave one out"

    def remarks(self) -> Iterator[str]:
        """What was given and has no effect, each as `--option: why`."""
        yield from super().remarks()
        given, preset = self.given, self.preset()
        if "unlabeled_share" in given and not self.distill:
            yield "--unlabeled-share has no effect with --no-distill"
        if "feature_ratio" in given and self.feature_loss == "none":
            yield "--feature-ratio has no effect without --feature-loss"
        if preset != "response":
            for name in sorted(given & {"distill_box", "distill_obj", "distill_cls"}):
                yield f"--{name.replace('_', '-')} has no effect with --distill-loss {preset}"
        if "auto_ratio" in given and self.distill_ratio != "auto":
            yield "--auto-ratio has no effect without --distill-ratio auto"
        yield from self._schedule_remarks()
        if preset != "boxes":
            for name in sorted(given & {"t_conf_thres", "t_nms_thres"}):
                yield f"--{name.replace('_', '-')} has no effect with --distill-loss {preset}"
        if "temperature" in given and preset != "kl" and not self.soft_loss:
            yield f"--temperature has no effect with --distill-loss {preset}"

    def _schedule_remarks(self) -> Iterator[str]:
        if "distill_final" in self.given and self.distill_schedule != "cosine":
            yield "--distill-final has no effect without --distill-schedule cosine"
        taught = self.epochs - self.stop_distill
        if self.distill_warmup > taught and self.resume is None:
            yield f"--distill-warmup {self.distill_warmup:g} is never over: the teacher has {taught} epochs"
