"""The index of a split: images, their sizes and their labels, checked once and cached.

Shapes: N images, T labels in all, n labels of one image, K classes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from utils.config.dataset import DatasetConfig
from utils.datasets.annotations import (
    NOTHING,
    Annotation,
    class_limit,
    label_bytes,
    normalised,
    parse_annotation,
)
from utils.datasets.images import UnreadableImageError, check_image
from utils.datasets.index_cache import CheckedImages, ContentDigest, read_cache, write_cache
from utils.datasets.labels import Labels
from utils.datasets.packed import GrowingRows, PackedRows, PackedTexts
from utils.datasets.sources import Source, is_among, list_sources
from utils.datasets.workers import cancel_on_error
from utils.errors import UserError
from utils.reporting.console import Console
from utils.words import counted, first_of

_In = TypeVar("_In")
_Out = TypeVar("_Out")
_THREADS = 8
_BLOCK = 4096
# Passing one to a thread takes four times as long as reading it.
_FILES_TOGETHER = 32
_SHOWN = 10
_SKIPPED = ("image skipped", "images skipped")
_CORRECTED = ("correction of labels, in memory only", "corrections of labels, in memory only")
_SINGLE_CLASS_NAME = "object"


@dataclass
class DatasetIndex:
    """Everything known about a split before any image is loaded.

    paths: N files, all of which were readable; packed on construction, like the labels.
    labels: N arrays (n, 5) float32: class, centre x, centre y, width, height, normalised.
    sizes_wh: (N, 2) int64, pixels as the loader reads them (EXIF orientation applied).
    labelled: (N,) bool; False for unlabelled images (whose ground truth is unknown, not empty).
    problems: sentences for the console about what was skipped or corrected.
    names: class names in the order of their ids.
    """

    paths: Sequence[str]
    labels: Sequence[Labels]
    sizes_wh: NDArray[np.int64]
    labelled: NDArray[np.bool_]
    problems: list[str]
    names: list[str]

    def __post_init__(self) -> None:
        """Pack paths and labels given as lists."""
        if not isinstance(self.paths, PackedTexts):
            self.paths = PackedTexts(self.paths)
        if not isinstance(self.labels, PackedRows):
            self.labels = PackedRows.of(self.labels)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.paths)

    @property
    def nc(self) -> int:
        """The number of classes."""
        return len(self.names)

    @property
    def unlabelled_count(self) -> int:
        """The number of unlabelled images."""
        return int(np.count_nonzero(~self.labelled))

    def all_labels(self) -> Labels:
        """Return the labels of all images in one (T, 5) array."""
        return self._rows.values

    def label_owners(self) -> NDArray[np.int64]:
        """Return the image number (T,) of each row of `all_labels`."""
        return np.repeat(np.arange(len(self)), self._rows.counts)

    @property
    def _rows(self) -> PackedRows:
        assert isinstance(self.labels, PackedRows)
        return self.labels

    def box_sizes_px(self, image_size: int) -> NDArray[np.float32]:
        """Return width and height (T, 2) of all boxes in pixels, with longer image sides of `image_size`."""
        scaled = self.sizes_wh * (image_size / self.sizes_wh.max(1, keepdims=True))
        sizes: NDArray[np.float32] = self.all_labels()[:, 3:] * scaled[self.label_owners()].astype(np.float32)
        return sizes

    def class_counts(self) -> NDArray[np.int64]:
        """Return the number of labels of each class (K,)."""
        return np.bincount(self.all_labels()[:, 0].astype(np.int64), minlength=self.nc)

    def class_weights(self) -> NDArray[np.float64]:
        """Return inverse class frequencies (K,), summing to 1; absent classes count as having one label."""
        weights = 1.0 / np.maximum(self.class_counts(), 1)
        return np.asarray(weights / weights.sum(), np.float64)

    def image_weights(self, class_weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum (N,) of the class weights (K,) over each image's labels."""
        of_label = class_weights[self.all_labels()[:, 0].astype(np.int64)]
        sums = np.bincount(self.label_owners(), weights=of_label, minlength=len(self))
        return sums.astype(np.float64)


def build_index(
    config: DatasetConfig,
    split: str,
    *,
    single_cls: bool = False,
    labels_optional: bool = False,
    cache_dir: Path | None = None,
    keep: bool = True,
    progress: bool = True,
) -> DatasetIndex:
    """Build the checked index of a split, or read it from the cache.

    The result is cached in the user's cache folder (or `cache_dir`) under a digest of everything it is
    made from, including the bytes of the label files, unless `keep` is off. Nothing is ever written
    beside the data. The split `unlabeled` gets no labels, even if there are label files for its images.
    labels_optional: if there is no label file at all, all images count as unlabelled.
    single_cls: all classes become one; their ids in label files may exceed those of the names.

    Raises:
        UserError: if there are no images or no label files, a label file cannot be read, or label lines
            are invalid (names the first few).
    """
    notes: list[str] = []
    sources = list_sources(config, split, notes.append)
    has_truth = split != "unlabeled"
    if has_truth and labels_optional and all(content is None for content in _label_files(sources, True)):
        has_truth = False
        notes.append(f"split '{split}' has no label file: nothing is scored")
    digest = ContentDigest(config.layout, config.names, has_truth, single_cls)
    for source, content in zip(sources, _label_files(sources, has_truth), strict=True):
        digest.add(source, content)
    classes = class_limit(config.layout, config.names, single_cls)
    checked = read_cache(str(digest), cache_dir, classes)
    if checked is None:
        if has_truth:
            _refuse_wrong_labels(sources, config, single_cls)
        title = f"checking {split}" if progress else None
        checked, found = _check(sources, config, has_truth, single_cls, title)
        # If they differ, label files have changed meanwhile, and the next run checks again.
        if keep and found == str(digest):
            write_cache(found, checked, cache_dir)
    if not len(checked.paths):
        what = f"split '{split}' has no readable image: {checked.problems[0]}"
        raise UserError(what, config.yaml_path, "--check-data lists everything that is wrong")
    # Once only: training indexes two splits of the same YAML.
    problems = [*(config.remarks if split == "train" else ()), *notes, *checked.problems]
    if has_truth and not len(checked.labels.values):
        problems.append(f"split '{split}' has no boxes: every image counts as background")
    labelled = np.full(len(checked.paths), has_truth)
    index = DatasetIndex(
        checked.paths, checked.labels, checked.sizes_wh, labelled, problems, list(config.names)
    )
    return _as_single_class(index) if single_cls else index


def without_images(index: DatasetIndex, others: Mapping[str, Iterable[str]]) -> DatasetIndex:
    """Drop the images that other splits (name to paths) contain; adds their number to the problems."""
    kept = np.ones(len(index), np.bool_)
    for split, pictures in others.items():
        index, free = _without(index, pictures, f"in '{split}' too, left out")
        kept &= free
    return index if kept.all() else _part(index, kept)


def join_unlabelled(train: DatasetIndex, unlabelled: DatasetIndex) -> DatasetIndex:
    """Concatenate a labelled and an unlabelled index.

    An image in both keeps its labels and is included once; adds the number of these to the problems.
    """
    assert train.names == unlabelled.names and not unlabelled.labelled.any()
    new = _part(*_without(unlabelled, train.paths, "in 'train' too, used as labelled only"))
    return replace(
        train,
        paths=[*train.paths, *new.paths],
        labels=[*train.labels, *new.labels],
        sizes_wh=np.concatenate([train.sizes_wh, new.sizes_wh]),
        labelled=np.concatenate([train.labelled, new.labelled]),
        problems=[*train.problems, *new.problems],
    )


def _without(
    index: DatasetIndex, pictures: Iterable[str], what: str
) -> tuple[DatasetIndex, NDArray[np.bool_]]:
    """Note the images that are in `pictures` as a problem; returns the index and a mask (N,) of the rest."""
    free = ~is_among(index.paths, pictures)
    twice = [index.paths[number] for number in np.flatnonzero(~free).tolist()]
    kind = (f"unlabelled image {what}", f"unlabelled images {what}")
    problems = [*index.problems, _sentence(kind, twice)] if twice else index.problems
    return replace(index, problems=problems), free


def _part(index: DatasetIndex, kept: NDArray[np.bool_]) -> DatasetIndex:
    """Return the index of the images for which `kept` (N,) is true."""
    numbers = np.flatnonzero(kept).tolist()
    return replace(
        index,
        paths=[index.paths[number] for number in numbers],
        labels=[index.labels[number] for number in numbers],
        sizes_wh=index.sizes_wh[kept],
        labelled=index.labelled[kept],
    )


def _as_single_class(index: DatasetIndex) -> DatasetIndex:
    values = index.all_labels().copy()
    values[:, 0] = 0
    labels = PackedRows(values, np.bincount(index.label_owners(), minlength=len(index)))
    return replace(index, labels=labels, names=merged_names(index.names))


def merged_names(names: Sequence[str]) -> list[str]:
    """Return the name, in a list, of the class that classes with these names become as one."""
    return list(names) if len(names) == 1 else [_SINGLE_CLASS_NAME]


def _label_files(sources: Sequence[Source], has_truth: bool) -> Iterator[bytes | None]:
    """Yield the content of each image's label file, None if there is none; reads lazily to save memory."""
    if not has_truth:
        return repeat(None, len(sources))
    return each_in_parallel(label_bytes, sources, together=_FILES_TOGETHER)


def _refuse_wrong_labels(sources: Sequence[Source], config: DatasetConfig, single_cls: bool) -> None:
    """Raise UserError if there are no label files or invalid lines, before any image is read."""
    mistakes: list[str] = []
    has_labels = False
    for source, content in zip(sources, _label_files(sources, True), strict=True):
        if content is not None:
            has_labels = True
            mistakes += _annotation(source, content, config, single_cls)[1]
    if not has_labels:
        raise no_label_files(sources, config)
    if mistakes:
        raise _wrong_lines(mistakes, config)


def _annotation(
    source: Source, content: bytes | None, config: DatasetConfig, single_cls: bool
) -> tuple[Annotation, list[str]]:
    """Return the annotation of an image and descriptions of its invalid lines."""
    if content is None:
        return replace(NOTHING, is_missing=True), []
    found, wrong = parse_annotation(content, config.layout, config.names, single_cls)
    return found, [f"{source.label}:{line}: {what}" for line, what in wrong]


def _wrong_lines(mistakes: Sequence[str], config: DatasetConfig) -> UserError:
    return UserError(
        f"{counted(len(mistakes), 'wrong label line')}: {first_of(mistakes, _SHOWN)}",
        config.yaml_path,
        "correct them, or the names in the dataset YAML; train.py --check-data lists all",
    )


def no_label_files(sources: Sequence[Source], config: DatasetConfig) -> UserError:
    """Return the error for a split without any label file."""
    return UserError(
        f"{counted(len(sources), 'image')} and not one label file; looked for {sources[0].label} and so on",
        config.yaml_path,
        "an empty label file marks an image without objects",
    )


def _check(
    sources: Sequence[Source], config: DatasetConfig, has_truth: bool, single_cls: bool, title: str | None
) -> tuple[CheckedImages, str]:
    """Read every image once, leaving out unreadable ones and noting corrections of labels.

    Also returns the digest of what was read. Raises UserError if labels have become invalid since they
    were checked.
    """
    digest = ContentDigest(config.layout, config.names, has_truth, single_cls)
    notes: dict[tuple[str, str], list[str]] = {}
    of = f"of {counted(len(sources), 'image')}"
    bare = (
        f"{of} has no label file and counts as background",
        f"{of} have no label file and count as background",
    )
    paths, sizes, labels = [], array("q"), GrowingRows()
    looked = each_in_parallel(checked_size, sources, title)
    for source, size, content in zip(sources, looked, _label_files(sources, has_truth), strict=True):
        digest.add(source, content)
        if isinstance(size, str):
            notes.setdefault(_SKIPPED, []).append(f"{source.image}: {size}")
            continue
        annotation, wrong = _annotation(source, content, config, single_cls) if has_truth else (NOTHING, [])
        if wrong:
            raise _wrong_lines(wrong, config)
        rows, corrections = normalised(annotation, size)
        for text in corrections:
            notes.setdefault(_CORRECTED, []).append(f"{source.label}: {text}")
        if annotation.is_missing:
            notes.setdefault(bare, []).append(source.image)
        paths.append(source.image)
        sizes.extend(size)
        labels.add(rows)
    problems = [_sentence(kind, entries) for kind, entries in notes.items()]
    sizes_wh = np.frombuffer(sizes, np.int64).reshape(-1, 2)
    return CheckedImages(PackedTexts(paths), sizes_wh, labels.packed(), problems), str(digest)


def checked_size(source: Source) -> tuple[int, int] | str:
    """Return the width and height of an image in pixels, or why it cannot be read."""
    try:
        return check_image(source.image)
    except UnreadableImageError as error:
        return str(error)


def _sentence(kind: tuple[str, str], entries: list[str]) -> str:
    """Return how many entries of a kind, in the singular and the plural, there are, and the first of them."""
    return f"{counted(len(entries), *kind)}: {first_of(entries, _SHOWN)}"


def in_parallel(work: Callable[[_In], _Out], items: Sequence[_In], title: str | None = None) -> list[_Out]:
    """Return the results of `each_in_parallel` as a list."""
    return list(each_in_parallel(work, items, title))


def each_in_parallel(
    work: Callable[[_In], _Out], items: Sequence[_In], title: str | None = None, together: int = 1
) -> Iterator[_Out]:
    """Yield the results in order, computed by threads: reading and decoding release the GIL.

    Items are submitted in blocks of a few thousand, as each queued one takes a kilobyte.
    title: of the progress bar; None shows none. together: so many items form a task.
    """

    def task(start: int) -> list[_Out]:
        return [work(item) for item in items[start : start + together]]

    with cancel_on_error(ThreadPoolExecutor(_THREADS)) as pool:
        starts, block = range(0, len(items), together), max(_BLOCK // together, 1)
        blocks = (starts[first : first + block] for first in range(0, len(starts), block))
        results = (result for block in blocks for done in pool.map(task, block) for result in done)
        console = Console(quiet=title is None)
        yield from console.progress(results, len(items), title or "", unit=" images")
