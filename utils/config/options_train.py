"""The options of train.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.config.hyperparameters import hyperparameter_warnings
from utils.config.options_base import (
    DATA,
    LEARNING,
    LENGTH,
    MACHINE,
    MODEL,
    RESULTS,
    RunOptions,
    download_field,
    dry_run_field,
    image_size,
    loader_workers,
    run_folders,
)
from utils.config.settings import at_least, between, option, settings_of

# The options that may change when a run is resumed; all others keep the values it was started with.
CHANGEABLE_ON_RESUME = frozenset(
    {
        *("epochs", "device", "workers", "patience", "noplots", "nosave", "cache", "save_period", "project"),
        "compile",
        # Locations may change: resuming checks by digest that data and teacher are still the same.
        *("save_every_steps", "data", "data_dir", "teacher", "logger", "evolve", "download"),
    }
)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    """The options of train.py."""

    weights: str = option("yolov5s.pt", "initial weights; '' trains from scratch", group=MODEL)
    cfg: str = option("", "model YAML; without it, the model stored in --weights is used", group=MODEL)
    head_by_name: bool = option(
        True,
        "where --weights knows other classes than the data has, keep what its head knows of those "
        "that both have by name; off, a head of another shape starts anew, as in the original",
        group=MODEL,
    )
    freeze: tuple[int, ...] = option(
        (),
        "layers not to train: a single number N freezes the first N, several freeze just these; batch norms "
        "still follow the data, as in the original",
        limits=at_least(0),
        group=MODEL,
    )
    data: Path = option(Path("data/coco128.yaml"), "dataset YAML", group=DATA)
    data_dir: Path | None = option(None, "root folder of the data, in place of the YAML's path", group=DATA)
    download: bool = download_field("data and public weights")
    check_data: bool = option(
        False,
        "only check every image and label, list all problems, and exit with 1 if there are any",
        group=DATA,
    )
    imgsz: int = image_size(640, "side of the square training images")
    rect: bool = option(
        False, "rectangular batches of images of similar aspect ratio, without mosaic", group=DATA
    )
    cache: Literal["ram", "disk"] | None = option(
        None,
        "cache the training images in memory or on disk (in the user's cache folder); without a value, ram",
        aliases=("cache-images",),
        bare="ram",
        group=DATA,
    )
    image_weights: bool = option(False, "sample images of poorly scored classes more often", group=DATA)
    single_cls: bool = option(False, "treat all classes as one", group=DATA)
    multi_scale: bool = option(False, "vary the image size from 0.5 to 1.5 times --imgsz", group=DATA)
    epochs: int = option(100, "number of epochs", limits=at_least(1), group=LENGTH)
    patience: int = option(
        100,
        "stop early after this many epochs without a better score; 0 never does",
        limits=at_least(0),
        unit="epochs",
        group=LENGTH,
    )
    resume: str | None = option(
        None,
        "resume a run: its folder or its last.pt; without a value, the newest of this script under --project",
        bare="",
        group=LENGTH,
    )
    hyp: Path = option(Path("data/hyp.scratch.yaml"), "hyperparameter YAML", group=LEARNING)
    evolve: int | None = option(
        None,
        "evolve hyperparameters over this many short runs in total, 300 without a value; continues "
        "what is in runs/evolve/NAME (or --project)",
        bare=300,
        limits=at_least(1),
        unit="runs",
        group=LEARNING,
    )
    batch_size: int = option(16, "images per batch", aliases=("batch",), limits=at_least(1), group=LEARNING)
    optimizer: Literal["SGD", "Adam", "AdamW"] = option("SGD", "optimizer", group=LEARNING)
    cos_lr: bool = option(False, "let the learning rate follow a cosine instead of a line", group=LEARNING)
    close_mosaic: int = option(
        0, "number of final epochs without mosaic", limits=at_least(0), unit="epochs", group=LEARNING
    )
    label_smoothing: float = option(
        0.0,
        "label smoothing epsilon; 0 takes the hyperparameter of that name",
        limits=between(0, 1),
        group=LEARNING,
    )
    noautoanchor: bool = option(
        False, "keep the anchors even where they fit the labels badly", group=LEARNING
    )
    seed: int = option(
        0,
        "random seed; a run with the same one repeats",
        limits=between(0, 2**32 - 1),
        group=LEARNING,
    )
    workers: int = loader_workers()
    amp: bool = option(True, "automatic mixed precision, see --amp-dtype", group=MACHINE)
    amp_dtype: Literal["auto", "fp16", "bf16"] = option(
        "auto",
        "reduced precision of --amp; auto is bf16 or fp16 on a GPU, as it supports them, and "
        "float32 on a CPU, with teachers in bf16 where it has AMX or AVX512-BF16; there bf16 trains"
        " up to twice as fast",
        group=MACHINE,
    )
    compile: bool = option(
        False,
        "compile the networks with torch.compile: minutes at the start, faster steps afterwards; "
        "needs a C++ compiler",
        group=MACHINE,
    )
    cuda_graphs: bool = option(True, "run networks and losses as CUDA graphs on a GPU", group=MACHINE)
    sync_bn: bool = option(
        False, "synchronise batch norms across all processes that torchrun starts", group=MACHINE
    )
    project: Path = run_folders("runs/train")
    nosave: bool = option(False, "save weights after the last epoch only", group=RESULTS)
    noval: bool = option(False, "validate after the last epoch only", group=RESULTS)
    save_every_steps: int = option(
        0,
        "also save the state for --resume every this many batches; 0 saves it after each epoch",
        limits=at_least(0),
        unit="batches",
        group=RESULTS,
    )
    noplots: bool = option(False, "write no images and no charts", group=RESULTS)
    logger: tuple[Literal["tensorboard", "wandb"], ...] = option(
        (), "also log to these, if installed; results.csv is always written", group=RESULTS
    )
    save_period: int = option(
        -1,
        "also keep a checkpoint every this many epochs; -1 keeps none",
        limits=at_least(-1),
        unit="epochs",
        group=RESULTS,
    )
    dry_run: bool = dry_run_field("build everything, try a few batches, estimate time and memory of the run")

    @property
    def makes_folder(self) -> bool:
        """Whether the run makes a new folder; an evolution goes on in one that exists."""
        return self.resume is None and self.evolve is None and not self.check_data

    def share_of_unlabelled(self) -> float | None:
        """Return the unlabelled fraction of a batch, 0..1; None if each image comes once per epoch.

        0 here, as training on labels has no loss on an unlabelled image.
        """
        return 0.0

    def distillation_epochs(self) -> int:
        """Return the number of epochs with distillation, if any; only then unlabelled images have a loss."""
        return self.epochs

    def contradictions(self) -> Iterator[str]:
        """Yield contradictions between options, as `--option: what is wrong`."""
        yield from super().contradictions()
        if self.resume is not None:
            settings = settings_of(type(self))
            fixed = [settings[name].flag for name in sorted(self.given - CHANGEABLE_ON_RESUME - {"resume"})]
            if fixed:
                them = "it" if len(fixed) == 1 else "them"
                yield f"{', '.join(fixed)}: cannot change when a run goes on, leave {them} out"
            return
        if not self.weights and not self.cfg:
            yield "--weights '': nothing to train, name a network too as in --cfg models/yolov5s.yaml"
        if self.rect and self.image_weights:
            yield "--image-weights: draws images at random and --rect orders them, leave one out"
        if self.noval and self.image_weights and self.evolve is None:
            yield "--image-weights: needs the scores of each epoch, leave --noval out"

    def warnings(self) -> Iterator[str]:
        """Yield warnings about options without effect or with an unexpected one."""
        if self.resume is None:
            yield from hyperparameter_warnings(self.hyp)
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
            unused |= set() if self.image_weights else {"patience"}  # needs each epoch's score
            for name in sorted(self.given & unused):
                yield f"--{name.replace('_', '-')} has no effect with --evolve"
