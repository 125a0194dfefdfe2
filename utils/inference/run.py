"""The work of detect.py: detect objects in images, videos and streams, and write the results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.boxes import NmsRules
from utils.config.command import after_detection, start_command
from utils.config.dataset import load_names
from utils.config.files import next_run_folder, run_folder_to_come
from utils.config.options import DetectOptions
from utils.datasets.images import Image
from utils.datasets.workers import usable_cpus
from utils.device import advice_on_memory, select_device
from utils.errors import UsageError, UserError
from utils.inference.backends import (
    configure_exported,
    network_in_words,
    open_networks,
    warn_of_nms_inside,
)
from utils.inference.detector import Detector, Prepared
from utils.inference.drawing import DrawStyle, draw_detections
from utils.inference.exported import ExportedNetwork, check_names, has_own_names
from utils.inference.frames import Frame, FrameSource
from utils.inference.image_process import WorkerSettings
from utils.inference.image_workers import (
    LEAST_IMAGES,
    ImageWorkers,
    are_plain_images,
    worker_count,
)
from utils.inference.outputs import LABELS, OutputChoice, Outputs
from utils.inference.pipeline import BackgroundTasks, in_groups, map_ahead
from utils.inference.predictor import Predictor
from utils.inference.preprocess import fitting_image_size
from utils.inference.sources import FileSource, PendingFrame, Unreadable, open_source, resolve_default_source
from utils.inference.streams import StreamSource
from utils.inference.viewer import Viewer
from utils.reporting.console import Console
from utils.words import counted


@advice_on_memory("a smaller --imgsz needs less")
def run_detect(options: DetectOptions, console: Console | None = None) -> Path | None:
    """Run detection on `options.source`; returns the results' folder, None if nothing is written."""
    console = console or Console()
    device = select_device(options.device)
    place = resolve_default_source(options.source)
    if place != options.source:
        console.info(f"{options.source} is not in this folder: these are the images that ship, {place}")
    source = open_source(place, options.vid_stride, console.warn)
    choice = OutputChoice(
        images=not options.nosave,
        labels=options.save_txt,
        confidences=options.save_conf,
        crops=options.save_crop,
        table=options.save_csv,
        vid_stride=options.vid_stride,
    )
    style = DrawStyle(options.line_thickness, options.hide_labels, options.hide_conf)
    viewer = Viewer(options.view_img, console.warn)
    with ExitStack() as stack:
        workers = _image_workers(options, source, choice, device)
        if workers is not None:
            stack.enter_context(workers)
        detector = _detector(options, device, console)
        if options.dry_run:
            _say_what_would_be_done(options, source, detector, console)
            return None
        folder = outputs = None
        if options.makes_folder:
            folder = next_run_folder(Path(options.project), options.name, options.exist_ok)
            if not options.exist_ok:
                stack.enter_context(_gone_if_unused(folder))
            outputs = stack.enter_context(Outputs(folder, detector.names, choice, source.files))
            if workers is not None:  # they write into the folder, which goes if nothing is in it
                stack.push(workers.__exit__)
        stack.callback(viewer.close)
        results = _Results(detector, style, outputs, viewer)
        settings = WorkerSettings(detector.size_hw, detector.stride, detector.whole, detector.names, style)
        if workers is not None and workers.configure(settings):
            assert isinstance(source, FileSource)
            count = _detect_by_workers(source, results, workers, console)
        else:
            count = _detect_all(source, results, console)
        _summarise(source, detector, count, console)
    if outputs is not None:
        labels = (
            f", {counted(outputs.labels.count, 'label file')} in {folder}/{LABELS}" if outputs.labels else ""
        )
        console.info(f"results in {folder}{labels}")
        if advice := after_detection(options, detector.found):
            console.info(advice)
    return folder


def _say_what_would_be_done(
    options: DetectOptions, source: FrameSource, detector: Detector, console: Console
) -> None:
    """Run detection on the first frame; report the number of files and where results would be written."""
    frame = next(iter(source), None)
    if frame is None:
        _summarise(source, detector, 0, console)
        return
    (found,) = detector.detect([detector.prepare(frame)])
    files = counted(len(source.files), "file") if source.files else "live frames"
    place = "nothing would be written"
    if options.makes_folder:
        folder = run_folder_to_come(Path(options.project), options.name, options.exist_ok)
        place = f"results would be in {folder}"
    console.info(
        f"dry run: all is ready, nothing was written; {files} from {options.source}, in the first "
        f"({frame.source}) {detector.in_words(found)}; {place}\n"
        f"start it: {start_command(options)}"
    )


def _detector(options: DetectOptions, device: torch.device, console: Console) -> Detector:
    network, weights, half = open_networks(options, device, console)
    given_names = load_names(options.data) if options.data else []
    if isinstance(network, ExportedNetwork):
        given = "imgsz" in options.given
        size_hw = configure_exported(network, options.imgsz, given, given_names, options.data, console)
        names = network.names
        warn_of_nms_inside(network, options, console)
    else:
        names = list(network.names)
        if given_names and not has_own_names(names):
            check_names(given_names, options.data, network.nc, weights)
            names = given_names
        sides = fitting_image_size(options.imgsz, network.size_multiple, console)
        size_hw = sides[0], sides[-1]
    if given_names and given_names != names:
        console.warn(
            f"--data: {weights} has its own class names, which are used, not those of {options.data}"
        )
    wrong = [number for number in options.classes or () if not 0 <= number < len(names)]
    if wrong:
        raise UsageError(f"there is no class {wrong[0]}", "--classes", f"0 to {len(names) - 1} in {weights}")
    console.info(f"{weights} on {network_in_words(network, device, size_hw)}")
    predictor = Predictor(network, _rules(options), half=half, augment=options.augment, warn=console.warn)
    detector = Detector(predictor, names, size_hw)
    detector.warm_up()
    return detector


@contextmanager
def _gone_if_unused(folder: Path) -> Iterator[None]:
    """Remove a run's folder if an exception occurs before anything is written into it."""
    try:
        yield
    except BaseException:
        for place in (folder / LABELS, folder):
            with suppress(OSError):
                place.rmdir()
        raise


def _rules(options: DetectOptions) -> NmsRules:
    return NmsRules(
        conf_thres=options.conf_thres,
        iou_thres=options.iou_thres,
        classes=options.classes or None,
        agnostic=options.agnostic_nms,
        max_det=options.max_det,
    )


def _image_workers(
    options: DetectOptions, source: FrameSource, choice: OutputChoice, device: torch.device
) -> ImageWorkers | None:
    """Return processes that read and write many images beside a GPU; None where threads serve better."""
    if not isinstance(source, FileSource) or options.dry_run or options.view_img or choice.crops:
        return None
    count = worker_count(device)
    if not count or len(source.paths) < LEAST_IMAGES or not are_plain_images(source.paths):
        return None
    try:
        return ImageWorkers(source.paths, (options.imgsz[0], options.imgsz[-1]), count)
    except OSError:  # too little memory, or too many processes
        return None


def _detect_by_workers(source: FileSource, results: _Results, workers: ImageWorkers, console: Console) -> int:
    """As `_detect_all`, with images read, drawn and written by other processes."""
    count, detector, outputs = 0, results.detector, results.outputs
    for one, detections in _detected(workers.prepared(source), detector, detector.batch, console):
        path = None if outputs is None else outputs.record(one.frame, detections)
        workers.finish(detections.numpy(), path)
        count += 1
    return count


def _detect_all(source: FrameSource, results: _Results, console: Console) -> int:
    """Run detection on every frame and return their number. Ends early if the user quits the viewer."""
    detector = results.detector
    # Of a live source only the newest frame matters, so there is no reading ahead and no batching.
    batch = 1 if isinstance(source, StreamSource) or results.viewer.enabled else detector.batch
    count, threads = 0, _threads(detector)
    prepared = (
        _prepared(source, detector, 2 * batch + threads, threads)
        if isinstance(source, FileSource)
        else map(detector.prepare, source)
    )
    with BackgroundTasks(2 * batch + threads, threads) as behind:
        for one, detections in _detected(prepared, detector, batch, console):
            count += 1
            if not results.take(one.frame, detections, behind):
                return count
    return count


def _detected(
    prepared: Iterable[Prepared], detector: Detector, batch: int, console: Console
) -> Iterator[tuple[Prepared, Tensor]]:
    """Yield each frame with its detections, and report it; a GPU computes the next batch meanwhile."""
    ahead = 1 if batch > 1 and detector.predictor.best_alone else 0
    started: deque[tuple[list[Prepared], Callable[[], list[Tensor]]]] = deque()

    def completed() -> Iterator[tuple[Prepared, Tensor]]:
        group, finish = started.popleft()
        found = finish()
        milliseconds = 1000 * detector.predictor.watch.last["inference"] / len(group)
        height, width = group[0].pixels.shape[2:]
        for one, detections in zip(group, found, strict=True):
            console.info(
                f"{one.frame.place} {one.frame.source}: {height}x{width}, {detector.in_words(detections)}, "
                f"{milliseconds:.1f} ms"
            )
            yield one, detections

    for group in in_groups(prepared, lambda one: one.pixels.shape, batch):
        started.append((group, detector.start(group)))
        if len(started) > ahead:
            yield from completed()
    while started:
        yield from completed()


def _threads(detector: Detector) -> int:
    """Return the number of threads for reading, and for writing.

    One of each is too slow for a GPU; on the CPU the network itself needs most cores.
    """
    on_gpu = detector.predictor.device.type == "cuda"
    return max(min(8, usable_cpus() if on_gpu else usable_cpus() // 4), 1)


def _prepared(source: FileSource, detector: Detector, depth: int, threads: int) -> Iterator[Prepared]:
    """Yield the prepared frames of files, read ahead by several threads."""

    def prepare(piece: PendingFrame) -> Prepared | Unreadable:
        found = piece.load()
        return found if isinstance(found, Unreadable) else detector.prepare(found)

    def size_of(found: Prepared | Unreadable) -> int:
        return found.frame.image.nbytes if isinstance(found, Prepared) else 0

    pieces = source.pieces()
    for found in map_ahead(prepare, pieces, size_of, depth, threads, lambda piece: piece.size):
        if isinstance(found, Unreadable):
            source.skip(found)
        else:
            yield found


@dataclass
class _Results:
    """Writes detections to files and shows them on the screen."""

    detector: Detector
    style: DrawStyle
    outputs: Outputs | None
    viewer: Viewer

    def take(self, frame: Frame, detections: Tensor, behind: BackgroundTasks) -> bool:
        """Show a frame, and draw and write it in the background; returns False if the user quits."""
        shown = self._drawn(frame, detections) if self.viewer.enabled else None
        if self.outputs is not None:
            behind(lambda: self._write(frame, detections, shown), frame.image.nbytes)
        return shown is None or self.viewer.show(frame.source, shown)

    def _write(self, frame: Frame, detections: Tensor, drawn: Image | None) -> Callable[[], None] | None:
        assert self.outputs is not None
        in_place = not (self.outputs.choice.crops or frame.live)

        def draw() -> Image:
            return self._drawn(frame, detections, in_place=in_place) if drawn is None else drawn

        return self.outputs.write(frame, detections, draw)

    def _drawn(self, frame: Frame, detections: Tensor, *, in_place: bool = False) -> Image:
        """Draw a frame's boxes; in place only if nothing else needs the frame."""
        image = frame.image if in_place else frame.image.copy()
        return draw_detections(image, detections.numpy(), self.detector.names, self.style)


def _summarise(source: FrameSource, detector: Detector, count: int, console: Console) -> None:
    if count == 0:
        reasons = "; ".join(source.skipped[:3]) or "no frames"
        raise UserError(f"nothing could be read ({reasons})", "--source", "check the files")
    if source.skipped:
        console.warn(f"{len(source.skipped)} skipped: {'; '.join(source.skipped)}")
    speed = detector.predictor.watch.milliseconds_per_image()
    console.info(
        f"{counted(count, 'image or frame', 'images or frames')}: "
        f"{speed['preprocess']:.1f} ms pre-process, {speed['inference']:.1f} ms inference, "
        f"{speed['nms']:.1f} ms NMS each"
    )
