"""The options of compare.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.config.options_base import (
    DATA,
    MODEL,
    RUNS,
    RunOptions,
    download_field,
    image_size,
    loader_workers,
    run_folders,
)
from utils.config.settings import at_least, option


@dataclass(frozen=True, kw_only=True)
class CompareOptions(RunOptions):
    """The options of compare.py."""

    runs: tuple[Path, ...] = option(
        (),
        "folders of training runs, such as runs/train/exp*, or a folder that holds some",
        positional=True,
        group=RUNS,
    )
    metric: str = option(
        "mAP50-95",
        "metric to compare: mAP50-95, mAP50, precision, recall or a column of results.csv",
        group=RUNS,
    )
    group: bool = option(
        True,
        "group runs that differ only in seed, name and paths; --no-group draws each by itself",
        group=RUNS,
    )
    ignore: tuple[str, ...] = option(
        (), "settings and hyperparameters to ignore when grouping, such as batch-size lr0", group=RUNS
    )
    weights: str = option(
        "",
        "instead of runs: a student, to draw the images on which it and --teacher disagree most",
        group=MODEL,
    )
    teacher: str = option(
        "", "weights of its teacher, or of any other network", aliases=("t-weights",), group=MODEL
    )
    data: Path = option(Path("data/coco128.yaml"), "dataset YAML of these images", group=DATA)
    download: bool = download_field("public data and weights")
    data_dir: Path | None = option(None, "root folder of the data, in place of the YAML's path", group=DATA)
    task: Literal["train", "val", "test"] = option("val", "split to look at", group=DATA)
    imgsz: int = image_size(640, "longer side of the images")
    batch_size: int = option(32, "images per batch", aliases=("batch",), limits=at_least(1), group=DATA)
    workers: int = loader_workers()
    project: Path = run_folders("runs/compare")

    def contradictions(self) -> Iterator[str]:
        """Yield contradictions between options, as `--option: what is wrong`."""
        yield from super().contradictions()
        if not self.runs and not self.weights and not self.teacher:
            yield "nothing to compare: name folders of runs (runs/train/exp*), or --weights and --teacher"
        if bool(self.weights) != bool(self.teacher):
            yield "--weights and --teacher: belong together, name both"
        if self.runs and self.weights:
            yield "--weights: draws images instead of comparing runs, leave the runs or it out"

    def warnings(self) -> Iterator[str]:
        """Yield warnings about options without effect."""
        of_runs = {"metric", "group", "ignore"}
        of_images = {"data", "download", "data_dir", "task", "imgsz", "batch_size", "workers", "device"}
        for name in sorted(self.given & (of_images if self.runs else of_runs)):
            without = "--weights and --teacher" if self.runs else "runs"
            yield f"--{name.replace('_', '-')} has no effect without {without}"
