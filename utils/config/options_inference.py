"""The options of test.py and detect.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from utils.config.options_base import (
    DATA,
    DETECTIONS,
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
from utils.config.settings import at_least, between, option

USUAL_CONFIDENCE = 0.001  # confidence threshold of published mAP figures


def confidence(default: float) -> Any:
    """Return the field for the confidence threshold."""
    text = "confidence threshold"
    return option(default, text, aliases=("conf",), limits=between(0, 1), group=DETECTIONS)


def overlap(default: float) -> Any:
    """Return the field for the NMS IoU threshold."""
    text = "NMS threshold"
    return option(default, text, aliases=("iou",), limits=between(0, 1), unit="IoU", group=DETECTIONS)


@dataclass(frozen=True, kw_only=True)
class InferenceOptions(RunOptions):
    """The options common to test.py and detect.py."""

    half: bool = option(False, "compute in float16 if the device is a GPU", group=MACHINE)
    dnn: bool = option(False, "without effect: .onnx files are run by onnxruntime", group=MODEL)
    augment: bool = option(False, "test-time augmentation: three sizes and a flip", group=MODEL)
    save_txt: bool = option(False, "write a label file for every image", group=RESULTS)
    save_conf: bool = option(False, "with confidences in the label files", group=RESULTS)
    dry_run: bool = dry_run_field("read weights and images, say what would be done")

    def contradictions(self) -> Iterator[str]:
        """Yield contradictions between options, as `--option: what is wrong`."""
        yield from super().contradictions()
        if not (self.weights and all(self.weights)):
            yield "--weights '': name a weight file"

    def warnings(self) -> Iterator[str]:
        """Yield warnings about options without effect or with an unexpected one."""
        if self.save_conf and not self.save_txt:
            yield "--save-conf has no effect without --save-txt"
        if self.dnn:
            yield "--dnn has no effect: .onnx files are run by onnxruntime"


@dataclass(frozen=True, kw_only=True)
class TestOptions(InferenceOptions):
    """The options of test.py."""

    weights: tuple[str, ...] = option(
        ("yolov5s.pt",), "weights to score; several form an ensemble", group=MODEL
    )
    data: Path = option(Path("data/coco128.yaml"), "dataset YAML", group=DATA)
    data_dir: Path | None = option(None, "root folder of the data, in place of the YAML's path", group=DATA)
    download: bool = download_field("data and public weights")
    task: Literal["train", "val", "test", "speed"] = option(
        "val", "split to score; speed times val in squares, with the thresholds of detect.py", group=DATA
    )
    imgsz: int = image_size(640, "longer side of the images")
    batch_size: int = option(32, "images per batch", aliases=("batch",), limits=at_least(1), group=DATA)
    rect: bool = option(True, "rectangular batches with little padding instead of squares", group=DATA)
    single_cls: bool = option(False, "treat all classes as one", group=DATA)
    conf_thres: float = confidence(USUAL_CONFIDENCE)
    iou_thres: float = overlap(0.6)
    max_det: int = option(300, "maximum number of detections per image", limits=at_least(1), group=DETECTIONS)
    workers: int = loader_workers()
    verbose: bool = option(
        False, "list the scores of every class even where there are 50 and more", group=RESULTS
    )
    save_json: bool = option(
        False, "write all detections in COCO format; scored by pycocotools if installed", group=RESULTS
    )
    noplots: bool = option(False, "write no images and no charts", group=RESULTS)
    project: Path = run_folders("runs/test")

    @property
    def makes_folder(self) -> bool:
        """Whether the test makes a folder; one of speed has nothing to write."""
        return self.task != "speed"

    def warnings(self) -> Iterator[str]:
        """Yield warnings about options without effect or with an unexpected one."""
        yield from super().warnings()
        if self.task == "speed":
            yield "--task speed scores with the thresholds of detect.py: not to be compared with other scores"
        elif self.conf_thres > USUAL_CONFIDENCE:
            yield (
                f"--conf-thres {self.conf_thres:g} leaves detections out: the scores, often too high, "
                f"do not compare with any at {USUAL_CONFIDENCE:g}, as all published figures are"
            )
        if self.task == "speed":
            for name in sorted(self.given & {"save_txt", "save_json", "conf_thres", "iou_thres", "rect"}):
                yield f"--{name.replace('_', '-')} has no effect with --task speed"


@dataclass(frozen=True, kw_only=True)
class DetectOptions(InferenceOptions):
    """The options of detect.py."""

    weights: tuple[str, ...] = option(
        ("yolov5s.pt",), "weights to detect with; several form an ensemble", group=MODEL
    )
    source: str = option(
        "data/images",
        "image, folder, pattern, video, stream address, list of them, or camera number",
        group=DATA,
    )
    data: str = option("", "dataset YAML with the class names, for weights that have none", group=DATA)
    download: bool = download_field("public weights")
    imgsz: tuple[int, ...] = image_size((640,), "image size: one number, or height and width")
    vid_stride: int = option(
        1, "process every this many frames of a video", limits=at_least(1), unit="frames", group=DATA
    )
    conf_thres: float = confidence(0.25)
    iou_thres: float = overlap(0.45)
    max_det: int = option(
        1000, "maximum number of detections per image", limits=at_least(1), group=DETECTIONS
    )
    classes: tuple[int, ...] = option(
        (), "keep only these classes, by number", limits=at_least(0), group=DETECTIONS
    )
    agnostic_nms: bool = option(
        False, "class-agnostic NMS: boxes of different classes suppress each other", group=DETECTIONS
    )
    view_img: bool = option(False, "show the results in a window", group=RESULTS)
    nosave: bool = option(False, "write no images and videos", group=RESULTS)
    save_csv: bool = option(False, "write all detections to predictions.csv", group=RESULTS)
    save_crop: bool = option(False, "write every detection as a cropped image", group=RESULTS)
    line_thickness: int = option(
        3, "line width of the boxes", limits=between(1, 100), unit="pixels", group=RESULTS
    )
    hide_labels: bool = option(False, "draw boxes without class names", group=RESULTS)
    hide_conf: bool = option(False, "draw class names without confidences", group=RESULTS)
    project: Path = run_folders("runs/detect")

    @property
    def makes_folder(self) -> bool:
        """Whether anything is to be written."""
        return not self.nosave or self.save_txt or self.save_crop or self.save_csv

    def contradictions(self) -> Iterator[str]:
        """Yield contradictions between options, as `--option: what is wrong`."""
        yield from super().contradictions()
        if not self.source:
            yield "--source '': name an image, folder, video, stream or camera"
        if len(self.imgsz) not in (1, 2):
            yield f"--imgsz: takes one number, or height and width, not {len(self.imgsz)} numbers"
