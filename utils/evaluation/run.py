"""What test.py does: evaluate weights on a split of a dataset."""

from __future__ import annotations

import codecs
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor

from models.ensemble import Network
from utils.batch import Batch
from utils.config.command import after_test, start_command
from utils.config.dataset import DatasetConfig
from utils.config.files import (
    next_run_folder,
    replace_atomically,
    run_folder_to_come,
    write_text_atomically,
)
from utils.config.options import TestOptions
from utils.datasets.download import get_dataset
from utils.datasets.index import DatasetIndex, build_index
from utils.datasets.loader import BatchLoader, eval_loader
from utils.device import advice_on_memory, select_device
from utils.distributed import from_main, joined_ranks, main_first, processes_of_command, rank
from utils.evaluation.coco import (
    CocoResults,
    annotations_from_index,
    official_annotations,
    score_with_pycocotools,
)
from utils.evaluation.evaluate import EvaluationResult, EvaluationSettings, Observer, evaluate
from utils.evaluation.plots import BatchPlots, save_score_plots
from utils.inference.backends import (
    configure_exported,
    network_in_words,
    open_networks,
    warn_of_nms_inside,
)
from utils.inference.classes import WantedClasses, fit_as_one, fit_classes
from utils.inference.exported import ExportedNetwork
from utils.inference.preprocess import fitting_image_size
from utils.inference.writers import LabelWriter, NameBook
from utils.reporting.console import Console, duration
from utils.words import counted

SPEED_CONF_THRES, SPEED_IOU_THRES = 0.25, 0.45  # as in detect.py
METRICS_NAME = "metrics.json"
_MANY_CLASSES = 50  # from this many on, the table lists them only with --verbose


@advice_on_memory()
def run_test(options: TestOptions, console: Console | None = None) -> EvaluationResult | None:
    """Evaluate `options.weights` and write what the options ask for into a new run folder.

    Processes started by torchrun share the images. With `dry_run` there are no scores and None is returned.
    """
    with joined_ranks():
        return _run_test(options, console or Console())


def _run_test(options: TestOptions, console: Console) -> EvaluationResult | None:
    device = select_device(options.device)
    split = "val" if options.task == "speed" else options.task
    with main_first():
        config = get_dataset(options.data, options.data_dir, [split], options.fetches, console.info)
    model, size, half = _network(options, config, device, console)
    with main_first():  # the other ranks read its index from the cache
        index = build_index(
            config,
            split,
            single_cls=options.single_cls,
            # As for a benchmark whose labels nobody has; otherwise missing labels are a mistake.
            labels_optional=options.task == "test" and (options.save_json or options.save_txt),
            keep=not options.dry_run,
        )
    for problem in index.problems:
        console.warn(problem)
    if options.dry_run:
        _say_what_would_be_done(options, model, size, index, half, console)
        return None
    result, report = _scored(options, model, size, index, half, console)
    if report.is_scored:
        by_class = options.verbose or 1 < len(index.names) < _MANY_CLASSES
        console.table(*result.table(verbose=by_class and result.labels > 0))
    _say_speed(result, options, size, console)
    report.finish(result, config, console)
    if options.task != "speed":
        console.info(after_test(options, index.paths[0]))
    return result


def _say_what_would_be_done(
    options: TestOptions,
    model: Network | ExportedNetwork,
    size: int | tuple[int, int],
    index: DatasetIndex,
    half: bool,
    console: Console,
) -> None:
    """Evaluate the first batch; print the estimate for all of them and where results would be saved."""
    loader = _loader(options, index, size, model.size_multiple)
    first = next(iter(loader), None)  # there may be fewer batches than ranks
    begun = time.monotonic()
    batches = [] if first is None else [first]
    evaluate(model, batches, names=index.names, settings=_settings(options, half))
    time_left = duration((time.monotonic() - begun) * len(loader))
    place = "nothing would be written"
    if options.makes_folder:
        folder = run_folder_to_come(Path(options.project), options.name, options.exist_ok)
        place = f"results would be in {folder}"
    sides = str(size) if isinstance(size, int) else " x ".join(map(str, size))
    console.info(
        f"dry run: all is ready, nothing was written; {counted(len(index), 'image')} in "
        f"{counted(-(-len(index) // options.batch_size), 'batch')} at {sides} px take about {time_left} to "
        f"score, {place}\n"
        f"start it: {start_command(options, processes_of_command())}"
    )


def _network(
    options: TestOptions, config: DatasetConfig, device: torch.device, console: Console
) -> tuple[Network | ExportedNetwork, int | tuple[int, int], bool]:
    """Return the network, the side or (height, width) of its images, and whether it computes in float16."""
    size: int | tuple[int, int]
    # Members of an ensemble need the same classes even where all count as one.
    advice = ", or all as one class with --single-cls" if len(options.weights) == 1 else ""
    wanted = WantedClasses(config.names, f"the data {config.yaml_path}", advice)
    of_members = None if options.single_cls else wanted
    network, weights, half = open_networks(options, device, console, of_members)
    if isinstance(network, ExportedNetwork):
        # A network without class names is assumed to have the data's classes.
        names = () if network.names else config.names
        size_hw = configure_exported(
            network, [options.imgsz], "imgsz" in options.given, names, config.yaml_path, console
        )
        size = size_hw if network.facts.size_hw is not None else size_hw[0]
        _remark_on(network, options, console)
    else:
        (size,) = fitting_image_size([options.imgsz], network.size_multiple, console)
        size_hw = size, size
    (fit_as_one if options.single_cls else fit_classes)(network, wanted, weights, console)
    console.info(f"{weights} on {network_in_words(network, device, size_hw)}")
    return network, size, half


def _remark_on(network: ExportedNetwork, options: TestOptions, console: Console) -> None:
    """Warn about what makes an exported network's scores differ from those of the .pt file."""
    if network.facts.size_hw is not None and options.rect and options.task != "speed":
        console.warn(f"{network.path} takes one shape: scores are those of --no-rect")
    warn_of_nms_inside(network, options, console)
    if network.facts.nms is not None:
        console.warn(
            f"{network.path} has NMS inside: what is scored are the detections above confidence "
            f"{network.facts.nms.conf_thres:g}, one class each; the scores do not compare with others"
        )


def _scored(
    options: TestOptions,
    model: Network | ExportedNetwork,
    size: int | tuple[int, int],
    index: DatasetIndex,
    half: bool,
    console: Console,
) -> tuple[EvaluationResult, _Report]:
    loader = _loader(options, index, size, model.size_multiple)
    settings, report = _settings(options, half), _Report(options, index)
    result = evaluate(
        model, loader, names=index.names, settings=settings, observers=report.observers, progress=console
    )
    return result, report


def _settings(options: TestOptions, half: bool) -> EvaluationSettings:
    for_speed = options.task == "speed"
    return EvaluationSettings(
        conf_thres=SPEED_CONF_THRES if for_speed else options.conf_thres,
        iou_thres=SPEED_IOU_THRES if for_speed else options.iou_thres,
        max_det=options.max_det,
        half=half,
        augment=options.augment,
        single_cls=options.single_cls,
    )


def _loader(
    options: TestOptions, index: DatasetIndex, image_size: int | tuple[int, int], stride: int
) -> BatchLoader:
    """Return the batches of a test; square when timing, so that all images take the same time."""
    return eval_loader(
        index,
        image_size=image_size,
        batch_size=options.batch_size,
        workers=options.workers,
        stride=stride,
        rect=options.rect and options.task != "speed",
    )


def _say_speed(
    result: EvaluationResult, options: TestOptions, size: int | tuple[int, int], console: Console
) -> None:
    speed = result.speed_ms
    shown = "x".join(map(str, size)) if isinstance(size, tuple) else size
    console.info(
        f"speed: {speed['preprocess']:.1f} ms pre-process, {speed['inference']:.1f} ms inference, "
        f"{speed['nms']:.1f} ms NMS per image at {shown} px, batch {options.batch_size}"
    )


@dataclass
class _LabelFiles:
    """Observer that writes the detections of every image as a label file."""

    writer: LabelWriter
    names: dict[str, str]

    def __call__(self, batch: Batch, detections: list[Tensor]) -> None:
        for path, letterbox, found in zip(batch.paths, batch.letterboxes, detections, strict=True):
            self.writer.write(self.names[path], found, letterbox.original_hw)


@dataclass
class _Report:
    """What a test writes into its folder: scores as JSON, and what the options ask for."""

    options: TestOptions
    index: DatasetIndex
    folder: Path | None = None
    observers: list[Observer] = field(default_factory=list)
    coco: CocoResults | None = None

    @property
    def is_scored(self) -> bool:
        """Whether the images have labels."""
        return bool(self.index.labelled.any())

    def __post_init__(self) -> None:
        options = self.options
        if not options.makes_folder:
            return
        if rank() == 0:
            self.folder = next_run_folder(Path(options.project), options.name, options.exist_ok)
        self.folder = from_main(self.folder)
        assert self.folder is not None
        if options.save_txt:
            book = NameBook()
            for path in self.index.paths:
                book.expect(Path(path).stem)
            names = {path: book.name(path, Path(path).stem) for path in self.index.paths}
            self.observers.append(_LabelFiles(LabelWriter(self.folder / "labels", options.save_conf), names))
        if options.save_json:
            self.coco = CocoResults(self.index)
            self.observers.append(self.coco)
        if not options.noplots and rank() == 0:
            self.observers.append(BatchPlots(self.folder, self.index.names))

    def finish(self, result: EvaluationResult, config: DatasetConfig, console: Console) -> None:
        """Write what needs all images, and print where everything is."""
        if self.coco is not None:
            self.coco.join_ranks()
        if self.folder is None or rank() > 0:
            return
        if self.is_scored:
            content = json.dumps(result.to_dict(), indent=2) + "\n"
            write_text_atomically(self.folder / METRICS_NAME, content)
            if not self.options.noplots:
                save_score_plots(self.folder, result)
        if self.coco is not None:
            self._score_with_coco(self.coco, config, console)
        console.info(f"results in {self.folder}")

    def _score_with_coco(self, coco: CocoResults, config: DatasetConfig, console: Console) -> None:
        assert self.folder is not None
        path = self.folder / f"{Path(self.options.weights[0]).stem}_predictions.json"
        replace_atomically(path, lambda stream: coco.write(cast(IO[str], codecs.getwriter("utf-8")(stream))))
        if not self.is_scored:
            return
        official = official_annotations(config.root, self.index)
        truth = official or annotations_from_index(self.index)
        scores = score_with_pycocotools(path, truth, self.index.paths)
        if scores is None:
            console.warn(f"{path} is not scored: pycocotools is missing (pip install pycocotools)")
            return
        map50_95, map50, table = scores
        against = official or "the labels"
        has_boxes = official is not None or any(map(len, self.index.labels))
        if not has_boxes or map50 < 0:  # pycocotools gives -1 for what is not defined
            console.info(f"pycocotools against {against}: nothing to score, as no image has a box")
            return
        console.info(table)
        console.info(f"pycocotools against {against}: mAP50 {map50:.4f}, mAP50-95 {map50_95:.4f}")
