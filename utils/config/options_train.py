"""The options of train.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.config.hyperparameters import remarks_on
from utils.config.options_base import (
    DATA,
    LEARNING,
    LENGTH,
    MACHINE,
    MODEL,
    RESULTS,
    RunOptions,
    image_size,
    loader_workers,
    may_fetch,
    rehearsal,
    run_folders,
)
from utils.config.settings import at_least, between, option, settings_of

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
    head_by_name: bool = option(
        True,
        "where the data's classes are not those of --weights, take over what its head knows of those that "
        "both have by name; without, a head of another shape starts anew, as in the original",
        group=MODEL,
    )
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
        "go on with a run: its folder or its last.pt; alone, the newest of this script under --project",
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
        "that precision; auto is bf16 or fp16, as the GPU can, and float32 on a CPU, with teachers in bf16 "
        "where it has AMX or AVX512-BF16; there bf16 trains up to twice as fast",
        group=MACHINE,
    )
    compile: bool = option(
        False,
        "let torch.compile make kernels of the networks: minutes at the start, then shorter steps; needs a "
        "C++ compiler",
        group=MACHINE,
    )
    cuda_graphs: bool = option(
        True, "launch the kernels of networks and losses together on a GPU", group=MACHINE
    )
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

    def taught_epochs(self) -> int:
        """How many epochs of the run have something to say about pictures without labels."""
        return self.epochs

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
        elif self.close_mosaic >= self.epochs:
            yield f"--close-mosaic {self.close_mosaic} leaves no epoch with mosaics"
        if self.nosave and self.save_period > 0:
            yield "--save-period has no effect with --nosave"
        if self.evolve is not None:
            unused = {"exist_ok", "noval", "nosave", "save_period", "logger"}
            unused |= set() if self.image_weights else {"patience"}  # without scores nothing is waited for
            for name in sorted(self.given & unused):
                yield f"--{name.replace('_', '-')} has no effect with --evolve"
