"""Builds what a run trains with: network, loaders, optimizer, schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from models.checkpoint import Checkpoint, check_network, read_checkpoint
from models.config import read_config
from models.places import resolve_weights
from models.transfer import has_anchors_of, known_by_name, transfer_head, transfer_weights
from models.yolo import Model
from utils.batch import Batch
from utils.config.dataset import DatasetConfig, load_dataset_config
from utils.config.hyperparameters import Hyperparameters
from utils.config.options import TrainOptions
from utils.datasets.download import get_dataset
from utils.datasets.index import DatasetIndex, build_index, join_unlabelled, without_images
from utils.datasets.loader import AugmentSettings, TrainLoader, eval_loader, train_loader
from utils.datasets.sampling import batch_compositions, images_of_rank, unlabelled_of_epoch
from utils.datasets.sources import is_among, list_sources
from utils.distributed import SharedBuffers, is_distributed, world_size
from utils.errors import UsageError, UserError
from utils.losses.detection import MOST_LEVELS, DetectionLoss, LossGains
from utils.reporting.console import Console
from utils.training.ema import ModelEma
from utils.training.exchange import GradientExchange
from utils.training.guard import INTERVAL, StepGuard
from utils.training.loop import MultiScale, Trainer
from utils.training.optimizer import RateSchedule, build_optimizer
from utils.training.precision import amp_dtype
from utils.training.step import TrainingStep
from utils.words import counted, were


@dataclass(frozen=True)
class Data:
    """The data of a run: the indexes of its splits and the classes the network is to learn.

    train: labelled images, and unlabelled ones if the run uses them. merged: the classes that
    `--single-cls` merges into one, empty without it.
    """

    config: DatasetConfig
    train: DatasetIndex
    val: DatasetIndex
    names: tuple[str, ...]
    merged: tuple[str, ...]


def check_yamls(options: TrainOptions) -> None:
    """Raise UserError if a YAML is unusable, or --freeze names layers that it lacks.

    Nothing is built or downloaded: the data itself may still be missing.
    """
    if options.cfg:
        content = read_config(options.cfg, nc=1).content
        rows = [row for part in ("backbone", "head") if isinstance(row := content.get(part), list)]
        _frozen(options.freeze, sum(map(len, rows)))
    load_dataset_config(options.data, options.data_dir, may_be_absent=True)


def find_weights(options: TrainOptions) -> Path | None:
    """Return the initial weight file, downloaded if it is a missing public one; None from scratch."""
    return resolve_weights(options.weights, options.fetches) if options.weights else None


def dataset(options: TrainOptions, say: Callable[[str], None]) -> DatasetConfig:
    """Load the dataset's settings and download its data if that is missing and allowed."""
    splits = ("train", "val") if options.share_of_unlabelled() == 0 else ("train", "val", "unlabeled")
    return get_dataset(options.data, options.data_dir, splits, options.fetches, say)


def read_data(options: TrainOptions, say: Callable[[str], None]) -> Data:
    """Index the training images and the validation split."""
    config = dataset(options, say)
    _check_share(options, config)
    train, val = (_index(options, config, split) for split in ("train", "val"))
    _warn_of_shared(train, val, say)
    train = _with_unlabelled(options, config, train, val)
    merged = config.names if options.single_cls and config.nc > 1 else ()
    return Data(config, train, val, tuple(train.names), tuple(merged))


def _warn_of_shared(train: DatasetIndex, val: DatasetIndex, say: Callable[[str], None]) -> None:
    """Say how many validation images are trained on too, as when both splits name one folder."""
    if shared := int(is_among(train.paths, val.paths).sum()):
        of = counted(len(val), "validation image")
        say(f"{shared} of {of} {were(shared)} given for training too: their scores say little")


def _index(options: TrainOptions, config: DatasetConfig, split: str) -> DatasetIndex:
    return build_index(config, split, single_cls=options.single_cls, keep=not options.dry_run)


def _check_share(options: TrainOptions, config: DatasetConfig) -> None:
    """Raise UserError if an unlabelled share is requested and the dataset has no unlabelled images."""
    if options.share_of_unlabelled() and "unlabeled" not in config.splits:
        fix = "add 'unlabeled:', or leave --unlabeled-share out"
        raise UserError("names no unlabelled images", config.yaml_path, fix)


def _with_unlabelled(
    options: TrainOptions, config: DatasetConfig, train: DatasetIndex, val: DatasetIndex
) -> DatasetIndex:
    """Return the training split, joined by the unlabelled images if the YAML has some and they are wanted.

    Images of the splits `val` and `test` are excluded from them: evaluation images must not be trained on.

    Raises:
        UserError: an unlabelled share is requested and no image is left for it.
    """
    share = options.share_of_unlabelled()
    if share == 0 or "unlabeled" not in config.splits:
        return train
    kept_back = {"val": val.paths, "test": _images_of_test_split(config)}
    others = without_images(_index(options, config, "unlabeled"), kept_back)
    joined = join_unlabelled(train, others)
    if share and not joined.unlabelled_count:
        fix = "give others, or leave --unlabeled-share out"
        raise UserError("every image of 'unlabeled' is in another split too", config.yaml_path, fix)
    return joined


def _images_of_test_split(config: DatasetConfig) -> list[str]:
    """Return the images of the test split; none if it is missing here, as training does not need it."""
    if "test" not in config.splits:
        return []
    try:
        return [source.image for source in list_sources(config, "test")]
    except UserError:
        return []


def build_network(
    options: TrainOptions, hyp: Hyperparameters, names: Sequence[str], console: Console
) -> tuple[Model, Checkpoint | None]:
    """Build the student from --cfg or from the config inside --weights and load the weights that fit.

    Also returns the weights from which `take_over_head` is to fill the head once the anchors are settled;
    usually None.
    """
    weights = find_weights(options)
    checkpoint = None if weights is None else read_checkpoint(weights)
    if not options.cfg and checkpoint is None:
        raise UsageError("nothing to train", "--weights ''", "name a network too: --cfg models/yolov5s.yaml")
    if not options.cfg and checkpoint is not None and not checkpoint.cfg:
        fix = "name its network too, as in --cfg models/yolov5s.yaml"
        raise UserError("it does not say what network it is", checkpoint.path, fix)
    if not options.cfg and checkpoint is not None:
        check_network(checkpoint)
    cfg = options.cfg or (checkpoint.cfg if checkpoint else {})
    model = Model(cfg, nc=len(names), anchors=hyp.anchors)
    _check_trainable(model, options.cfg or weights)
    model.names = list(names)
    if checkpoint is not None:
        # The user's cfg decides about anchors; without one the anchors in the file go with its weights.
        own_anchors = bool(options.cfg) or hyp.anchors is not None
        by_name = options.head_by_name and bool(known_by_name(model, checkpoint))
        matched, total = transfer_weights(model, checkpoint, own_anchors, exclude_head=by_name)
        console.info(f"{weights}: {matched} of {total} weights fit the network")
        return model, checkpoint if by_name else None
    return model, None


def _check_trainable(model: Model, place: object) -> None:
    """Raise UserError with `place` if the losses or the images are not made for such a network."""
    model.check_takes_colour(place)
    if not bool((model.stride.diff() > 0).all()):
        fix = "list Detect's layers from the finest to the coarsest, as in models/yolov5s.yaml"
        strides = ", ".join(f"{stride:g}" for stride in model.stride.tolist())
        raise UserError(f"its levels have strides {strides}", place, fix)
    if len(model.stride) > MOST_LEVELS:
        what = f"its head has {len(model.stride)} levels, the loss has weights for {MOST_LEVELS}"
        raise UserError(what, place, "give Detect fewer layers")


def take_over_head(model: Model, checkpoint: Checkpoint, console: Console) -> None:
    """Initialise a new head with what the weights' head knows of the data's classes, and report it."""
    known, names = known_by_name(model, checkpoint), model.names
    these = f"{len(known)} of {counted(len(names), 'class')}"
    if not has_anchors_of(model, checkpoint):
        console.info(f"the weights know {these} by name, for other anchors: the head starts anew")
    elif transfer_head(model, checkpoint):
        console.info(f"the head goes on with what the weights know by name: {these}")


def freeze_layers(model: Model, freeze: Sequence[int]) -> None:
    """Freeze the first N layers for one number N, or the listed layers for several."""
    for index in _frozen(freeze, len(model.model)):
        model.model[index].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("nothing is left to train", "--freeze", "freeze fewer layers")


def _frozen(freeze: Sequence[int], count: int) -> Sequence[int]:
    """Return the indices of the layers to freeze, of `count`. Raises UsageError for any beyond."""
    frozen = range(freeze[0]) if len(freeze) == 1 else freeze
    wrong = [index for index in frozen if not 0 <= index < count]
    if wrong:
        ways = f"asks for the first {freeze[0]} of", f"there is no layer {wrong[0]} among"
        what = f"{ways[len(freeze) > 1]} {count} layers"
        raise UsageError(what, "--freeze", f"layers are numbered 0 to {count - 1}")
    return frozen


def images_per_epoch(options: TrainOptions, index: DatasetIndex) -> int:
    """Return the number of images in an epoch, counting repeated ones each time."""
    labelled, share = len(index) - index.unlabelled_count, options.share_of_unlabelled()
    if not share:
        return len(index)
    if options.rect:
        return labelled + unlabelled_of_epoch(labelled, share)
    return sum(map(sum, batch_compositions(labelled, options.batch_size, share)))


def batch_of_a_rank(options: TrainOptions) -> int:
    """Return the batch size of one process; --batch-size is that of all together.

    Raises UsageError if it cannot be divided evenly.
    """
    if options.batch_size % world_size():
        raise UsageError(
            f"{options.batch_size} images do not divide among {world_size()} processes",
            "--batch-size",
            f"take a multiple of {world_size()}",
        )
    return options.batch_size // world_size()


def scoring_batch(options: TrainOptions) -> int:
    """Return how many validation images share a shape: twice --batch-size, as no gradients are kept."""
    return 2 * options.batch_size


def synchronised_norms(model: Model, options: TrainOptions, device: torch.device, console: Console) -> None:
    """Convert batch norms to SyncBatchNorm if --sync-bn asks for it.

    Raises UsageError on a CPU, where torch has no such layer.
    """
    if not options.sync_bn:
        return
    if not is_distributed():
        console.warn("--sync-bn changes nothing in a single process; torchrun starts several")
        return
    if device.type != "cuda":
        raise UsageError("works on GPUs alone", "--sync-bn", "leave it out on a CPU")
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]


def in_parallel(step: TrainingStep, device: torch.device) -> DistributedDataParallel | None:
    """Wrap the step in DistributedDataParallel, which averages gradients; None in a single process."""
    if not is_distributed():
        return None
    # The detection loss reaches every parameter; without it some parameters may get no gradient.
    partial = not any(isinstance(loss, DetectionLoss) for loss in step.losses)
    return DistributedDataParallel(
        step,
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=partial,
        gradient_as_bucket_view=True,
    )


def check_batches(options: TrainOptions, index: DatasetIndex, image_size: int, multiple: int) -> None:
    """Raise UsageError if a batch would have a single value per channel, which batch norm rejects."""
    smallest = max(image_size // 2 // multiple * multiple, multiple) if options.multi_scale else image_size
    if smallest == multiple and 1 in (batch_of_a_rank(options), *_images_of_last_batches(options, index)):
        among = f" among {world_size()} processes" if world_size() > 1 else ""
        raise UsageError(
            f"a batch would be a single image, and at {smallest} px the coarsest level a single cell",
            f"--batch-size {options.batch_size} with {images_per_epoch(options, index)} images{among}",
            "take a larger --imgsz or another --batch-size",
        )


def _images_of_last_batches(options: TrainOptions, index: DatasetIndex) -> set[int]:
    """Return the possible sizes of a rank's last batch in an epoch; 0 where it is as large as the others."""
    images, ranks, batch_size = images_per_epoch(options, index), world_size(), batch_of_a_rank(options)
    share = options.share_of_unlabelled()
    if options.rect:
        return {images % batch_size}
    if share:
        labelled = len(index) - index.unlabelled_count
        last = sum(batch_compositions(labelled, options.batch_size, share)[-1])
        return {max(last // ranks, 1), math.ceil(last / ranks)}
    return {images_of_rank(images, batch_size, number, ranks) % batch_size for number in range(ranks)}


def loaders(
    options: TrainOptions, hyp: Hyperparameters, data: Data, image_size: int, stride: int
) -> tuple[TrainLoader, DataLoader[Batch]]:
    """Build the training loader and the validation loader (twice the batch size)."""
    augment = AugmentSettings.of(hyp)
    training = train_loader(
        data.train,
        image_size=image_size,
        batch_size=batch_of_a_rank(options),
        augment=augment,
        workers=options.workers,
        seed=options.seed,
        stride=stride,
        rect=options.rect,
        # A dry run writes nothing to disk.
        cache=None if options.dry_run and options.cache == "disk" else options.cache,
        mosaic_until=options.epochs - options.close_mosaic,
        unlabelled_until=options.distillation_epochs(),
        unlabelled_share=options.share_of_unlabelled(),
    )
    validation = eval_loader(
        data.val,
        image_size=image_size,
        batch_size=2 * batch_of_a_rank(options),
        group_size=scoring_batch(options),
        workers=options.workers,
        stride=stride,
    )
    return training, validation


def detection_loss(
    model: Model, options: TrainOptions, hyp: Hyperparameters, image_size: int
) -> DetectionLoss:
    """Build the ground-truth loss with the public gains scaled to head, classes and image size."""
    smoothing = options.label_smoothing or hyp.label_smoothing
    gains = LossGains(
        hyp.box, hyp.obj, hyp.cls, hyp.cls_pw, hyp.obj_pw, hyp.anchor_t, hyp.fl_gamma, smoothing
    ).scaled(model.head.nl, model.nc, image_size)
    return DetectionLoss(model.head.anchors, model.nc, gains)


def build_trainer(
    step: TrainingStep,
    ema: ModelEma,
    options: TrainOptions,
    hyp: Hyperparameters,
    image_size: int,
    device: torch.device,
) -> Trainer:
    """Build the optimizer, schedule and precision around a step and its EMA."""
    accumulated = max(round(hyp.nbs / options.batch_size), 1) * options.batch_size
    optimizer = build_optimizer(
        [step],
        options.optimizer,
        rate=hyp.lr0,
        momentum=hyp.momentum,
        weight_decay=hyp.weight_decay * accumulated / hyp.nbs,
    )
    schedule = RateSchedule(
        rate=hyp.lr0,
        final=hyp.lrf,
        cosine=options.cos_lr,
        momentum=hyp.momentum,
        warmup_epochs=hyp.warmup_epochs,
        warmup_momentum=hyp.warmup_momentum,
        warmup_bias_rate=hyp.warmup_bias_lr,
        batch_size=options.batch_size,
        nominal_batch=hyp.nbs,
    )
    dtype = amp_dtype(options.amp, options.amp_dtype, device)
    fixed_shapes = not (options.rect or options.multi_scale)
    # Within a CUDA graph batch norms could not exchange their statistics.
    graphs = device.type == "cuda" and options.cuda_graphs and fixed_shapes and not options.sync_bn
    return Trainer(
        step=step,
        optimizer=optimizer,
        schedule=schedule,
        ema=ema,
        device=device,
        # It also skips updates with non-finite gradients, which may occur in any precision.
        scaler=torch.amp.GradScaler(device.type, init_scale=65536.0 if dtype is torch.float16 else 1.0),
        guard=StepGuard([step.model, ema.model], interval=1 if device.type == "cpu" else INTERVAL),
        amp_dtype=dtype,
        parallel=None if graphs else in_parallel(step, device),
        exchange=GradientExchange(step) if graphs and is_distributed() else None,
        shared_average=SharedBuffers(ema.model) if step.uses_average else None,
        fixed_shapes=fixed_shapes,
        multi_scale=MultiScale(image_size, step.model.size_multiple, options.seed)
        if options.multi_scale
        else None,
    )
