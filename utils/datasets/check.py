"""Report every problem of a dataset without training on it: `train.py --check-data`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.config.dataset import DatasetConfig
from utils.datasets.annotations import NOTHING, label_bytes, normalised, parse_annotation
from utils.datasets.index import checked_size, in_parallel, merged_names, no_label_files
from utils.datasets.labels import Labels
from utils.datasets.shared import shared_images
from utils.datasets.sources import Source, list_sources, unused_files
from utils.errors import UserError
from utils.words import are, counted

# `test` is not needed: training does not use it, and it is often not published.
SPLITS = ("train", "val", "unlabeled", "test")
_NEEDED = ("train", "val")
_TRAINED, _EVALUATED = ("train", "unlabeled"), ("val", "test")
_SHOWN = 5
COLUMNS = ("split", "images", "unlabelled", "unusable", "boxes", "wrong", "corrected", "no label file")


@dataclass
class SplitReport:
    """Findings in a split; each list entry is a sentence that starts with the file concerned.

    paths: those of the images. boxes: labels that training would use. failures: why the split as a whole
    cannot be used. unusable: images that cannot be read. wrong: invalid label lines, on which training
    would stop. corrected: labels corrected in memory. remarks: oddities that may be intended. bare: images
    without a label file, which count as background.
    """

    split: str
    paths: list[str] = field(default_factory=list)
    boxes: int = 0
    bare: int = 0
    failures: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    corrected: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def images(self) -> int:
        """The number of its images."""
        return len(self.paths)

    @property
    def has_truth(self) -> bool:
        """Whether its images are expected to have labels."""
        return self.split != "unlabeled"

    @property
    def is_good(self) -> bool:
        """Whether training would accept the whole split."""
        return not (self.failures or self.unusable or self.wrong)

    def lines(self) -> Iterator[str]:
        """Yield every finding, the most severe kind first."""
        kinds = (
            ("cannot be used", self.failures),
            ("image unusable", self.unusable),
            ("label wrong", self.wrong),
            ("label corrected in memory", self.corrected),
            ("remark", self.remarks),
        )
        for kind, entries in kinds:
            yield from (f"{self.split}: {kind}: {entry}" for entry in entries)

    def row(self) -> tuple[object, ...]:
        """Return the table cells of `COLUMNS`."""
        unlabelled = 0 if self.has_truth else self.images
        counts = (len(self.unusable), self.boxes, len(self.wrong), len(self.corrected), self.bare)
        return self.split, self.images, unlabelled, *counts


def check_data(
    config: DatasetConfig,
    say: Callable[[str], None],
    table: Callable[[Sequence[Sequence[object]], Sequence[str]], None],
    single_cls: bool = False,
) -> Path:
    """Check every image and label of a dataset, report all problems and return the path of its YAML.

    Uses no cache and writes no files.

    Args:
        config: the dataset.
        say: prints a line.
        table: prints the summary from its rows and header.
        single_cls: whether training would treat all classes as one.

    Raises:
        UserError: if there are problems, with their counts.
    """
    for remark in config.remarks:
        say(f"remark: {remark}")
    reports = []
    for split in SPLITS:
        if split in _NEEDED or split in config.splits:
            reports.append(check_split(config, split, single_cls=single_cls))
            for line in reports[-1].lines():
                say(line)
    for remark in _trained_and_evaluated(reports):
        say(remark)
    table([report.row() for report in reports], COLUMNS)
    bad = [report for report in reports if not report.is_good]
    if bad:
        unusable, wrong = (
            sum(len(getattr(report, kind)) for report in bad) for kind in ("unusable", "wrong")
        )
        whole = "".join(f"; split '{report.split}' cannot be used" for report in bad if report.failures)
        raise UserError(
            f"{counted(unusable, 'image')} unusable, {counted(wrong, 'label line')} wrong{whole}",
            config.yaml_path,
            "fix them, or take them out of the dataset",
        )
    say(f"{config.yaml_path}: nothing is wrong")
    return config.yaml_path


def _trained_and_evaluated(reports: Sequence[SplitReport]) -> Iterator[str]:
    """Yield a remark on each evaluated split that shares images with one that is trained on."""
    splits = {report.split: report.paths for report in reports}
    trained, evaluated = (
        {split: splits[split] for split in kind if split in splits} for kind in (_TRAINED, _EVALUATED)
    )
    for split, other, shared in shared_images(trained, evaluated):
        of = f"{len(shared)} of {counted(len(splits[split]), 'image')}"
        image, same = shared[0]
        what = f"{image}, the same as {same}" if image != same else image
        yield (
            f"{split}: remark: {of} {are(len(shared))} in '{other}' too, such as {what}: "
            "their scores say little"
        )


def check_split(
    config: DatasetConfig, split: str, progress: bool = True, single_cls: bool = False
) -> SplitReport:
    """Return the report on a split; single_cls: whether training would treat all classes as one."""
    report = SplitReport(split)
    try:
        sources = list_sources(config, split, report.remarks.append)
    except UserError as error:
        # The test images of a benchmark are often withheld.
        (report.remarks if split == "test" else report.failures).append(str(error))
        return report
    report.paths = [source.image for source in sources]
    has_truth = report.has_truth
    sizes = in_parallel(checked_size, sources, f"checking {split}" if progress else None)
    names = merged_names(config.names) if single_cls else config.names
    counts = np.zeros(len(names), np.int64)
    for source, size in zip(sources, sizes, strict=True):
        if isinstance(size, str):
            report.unusable.append(f"{source.image}: {size}")
        if has_truth:
            labels = _check_labels(
                config, source, None if isinstance(size, str) else size, report, single_cls
            )
            ids = np.zeros(len(labels)) if single_cls else labels[:, 0]
            counts += np.bincount(ids.astype(np.int64), minlength=len(names))
    report.boxes = int(counts.sum())
    report.remarks += _passed_over(config, split, sources)
    if len(report.unusable) == len(sources):
        report.failures.append("no image can be read")
    if has_truth and report.bare == len(sources):
        report.failures.append(str(no_label_files(sources, config)))
    elif has_truth and not counts.all():
        missing = ", ".join(f"'{names[number]}'" for number in np.flatnonzero(counts == 0))
        report.remarks.append(f"{config.yaml_path}: no box is of class {missing}")
    return report


def _passed_over(config: DatasetConfig, split: str, sources: Sequence[Source]) -> Iterator[str]:
    try:
        for folder, how_many, files in unused_files(config, split, sources):
            if files:
                names = ", ".join(os.path.relpath(file, folder) for file in files[:_SHOWN])
                yield f"{folder}: {how_many}: {names}{', ...' if len(files) > _SHOWN else ''}"
    except UserError as error:  # a label folder that can be opened but not listed
        yield str(error)


def _check_labels(
    config: DatasetConfig,
    source: Source,
    size_wh: tuple[int, int] | None,
    report: SplitReport,
    single_cls: bool,
) -> Labels:
    """Add the label problems of an image to the report; `size_wh` is None if the image is unusable.

    Returns the labels (n, 5) that training would use, with their classes as they are in the file.
    """
    nothing = np.zeros((0, 5), np.float32)
    try:
        content = label_bytes(source)
    except UserError as error:
        report.wrong.append(str(error))
        return nothing
    if content is None:
        report.bare += 1
        report.remarks.append(f"{source.image}: has no label file, counts as background")
        return nothing
    annotation, wrong = parse_annotation(content, config.layout, config.names, single_cls)
    report.wrong += [f"{source.label}:{line}: {what}" for line, what in wrong]
    if size_wh is None or annotation is NOTHING:
        return nothing
    labels, corrections = normalised(annotation, size_wh)
    report.corrected += [f"{source.label}: {what}" for what in corrections]
    return labels
