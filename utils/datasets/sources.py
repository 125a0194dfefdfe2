"""The images of a split, and where the labels of each are."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from utils.config.dataset import DatasetConfig
from utils.config.files import read_regular
from utils.datasets.images import is_image
from utils.datasets.labels import lines_of
from utils.errors import UserError
from utils.words import counted

LABEL_SUFFIX = ".txt"
_MAX_LIST_BYTES = 256 << 20  # a few million images; a split may have several lists
_LOOKED_AT = 50  # lines of a list that are checked for existing images
# Lists for one class append 1, 0 or -1 to each name.
_CLASS_FLAG = re.compile(r"\s+(-1|0|1)$")


@dataclass(frozen=True, slots=True)
class Source:
    """An image and its label file; either may turn out to be missing."""

    image: str
    label: str


def list_sources(
    config: DatasetConfig, split: str, say: Callable[[str], object] = lambda note: None
) -> list[Source]:
    """Return the images of a split in a fixed order, without duplicates.

    say: takes a note on each list whose lines are relative to the working folder.

    Raises:
        UserError: if the split is missing, has a folder that cannot be read, or has no images.
    """
    entries = config.entries(split)
    found: dict[str, Source] = {}
    for entry in entries:
        for source in (
            _voc_sources(entry, config.root)
            if config.layout == "voc"
            else _yolo_sources(entry, config.root, say)
        ):
            found.setdefault(source.image, source)
    if not found:
        listed = ", ".join(str(entry) for entry in entries)
        raise UserError(f"split '{split}' has no images", listed, "check the paths in the dataset YAML")
    return list(found.values())


def is_among(images: Sequence[str], others: Iterable[str]) -> NDArray[np.bool_]:
    """Return a mask (N,) of the images whose file is also one of the others', by whatever links."""
    files = {_file_of(path) for path in others}
    return np.array([_file_of(path) in files for path in images], np.bool_)


def _file_of(path: str) -> int | str:
    """Return what tells a path's file from all others; the path itself if nothing else does."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return path
    # As one number, which takes a third of a pair's memory. 0: a file system without numbers.
    return status.st_dev << 64 | status.st_ino if status.st_ino else path


def is_split_there(config: DatasetConfig, split: str) -> bool:
    """Return whether a split's folders and lists exist, and for each list one of the first images."""
    return all(_is_entry_there(entry, config) for entry in config.splits[split])


def _is_entry_there(entry: Path, config: DatasetConfig) -> bool:
    if not os.path.exists(entry):
        return False
    if os.path.isdir(entry) or (config.layout == "yolo" and is_image(entry)):
        return True
    if config.layout == "voc":
        return os.path.isdir(_voc_base(entry, config.root) / "JPEGImages")
    images, _ = _from_list(_lines(entry)[:_LOOKED_AT], entry, config.root)
    return any(map(os.path.exists, images))


def unused_files(
    config: DatasetConfig, split: str, sources: Sequence[Source]
) -> Iterator[tuple[Path, str, list[str]]]:
    """Yield the unused files in a split's folders, as (folder, number and kind in words, files).

    Lists name exactly what they use, so only image folders and their label folders are searched.

    Raises:
        UserError: if one of the folders cannot be read.
    """
    labels, has_truth = {source.label for source in sources}, split != "unlabeled"
    for entry in config.entries(split):
        if config.layout == "voc" or not os.path.isdir(entry):
            continue
        label_folder = Path(label_path(os.path.join(entry, "any"))).parent
        beside = _files_below(label_folder) if os.path.isdir(label_folder) else ()
        texts = (file for file in beside if file.endswith(LABEL_SUFFIX))
        orphans = set(texts) - labels if has_truth else set()
        others = {file for file in _files_below(entry) if not is_image(file)} - labels - orphans
        no_images = "file that is not an image by its name", "files that are not images by their names"
        yield entry, counted(len(others), *no_images), sorted(others)
        alone = "label file without an image", "label files without an image"
        yield label_folder, counted(len(orphans), *alone), sorted(orphans)


def label_path(image: str) -> str:
    """Return the path of an image's label file: the last folder `images` becomes `labels`, the suffix .txt.

    Without such a folder it lies beside the image.
    """
    stem, _ = os.path.splitext(image)
    folders = stem.split(os.sep)
    for place in range(len(folders) - 2, -1, -1):
        if folders[place] == "images":
            folders[place] = "labels"
            break
    return os.sep.join(folders) + LABEL_SUFFIX


def _yolo_sources(entry: Path, root: Path, say: Callable[[str], object]) -> list[Source]:
    if os.path.isdir(entry):
        images = list(_images_below(entry))
    elif is_image(entry):
        images = [str(entry)]
    else:
        images, note = _from_list(_lines(entry), entry, root)
        if note:
            say(note)
        if images and not any(map(os.path.exists, images)):
            raise UserError(
                f"none of its {len(images)} images is there, the first is {images[0]}",
                entry,
                "its lines are absolute, or relative to the list, to the dataset's or to the working folder",
            )
    return [Source(image, label_path(image)) for image in sorted(images)]


def _images_below(entry: Path) -> Iterator[str]:
    """Yield the images in a folder and its subfolders, without hidden ones."""
    return filter(is_image, _files_below(entry))


def _files_below(entry: Path) -> Iterator[str]:
    """Yield the files in a folder and its subfolders, without hidden ones.

    Follows links, except those to a parent folder, which would never end.

    Raises:
        UserError: if a folder cannot be read: without its images it would be another dataset.
    """
    for folder, folders, names in os.walk(entry, onerror=_refuse_folder, followlinks=True):
        seen = (name for name in folders if not is_hidden(name))
        folders[:] = [name for name in seen if not _leads_up(entry, folder, name)]
        yield from (os.path.join(folder, name) for name in names if not is_hidden(name))


def _refuse_folder(error: OSError) -> NoReturn:
    fix = "give yourself the right to read it, or leave it out of the dataset"
    raise UserError(f"the folder cannot be read ({error.strerror or error})", error.filename, fix) from error


def _leads_up(entry: Path, folder: str, name: str) -> bool:
    """Return whether a name in a folder below `entry` is a link to one of its parent folders."""
    path = Path(folder, name)
    if not os.path.islink(path):
        return False
    target = os.path.realpath(path)
    passed = [Path(folder), *Path(folder).parents][: len(Path(folder).parts) - len(entry.parts) + 1]
    return os.path.realpath(folder).startswith(os.path.join(target, "")) or any(
        os.path.realpath(place) == target for place in passed
    )


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden: its name starts with a dot."""
    return name.startswith(".")


def _from_list(lines: Sequence[str], listing: Path, root: Path) -> tuple[list[str], str]:
    """Resolve the lines of an image list: absolute, or relative to the list's folder or the root.

    If none of these images exists, all lines are resolved against the working folder, provided that this
    finds any: YOLOv5 does so unless a line starts with `./`. The second value says so; else it is empty.
    """
    images = [_resolve(line, (listing.parent, root)) for line in lines]
    in_doubt = not any(line.startswith("./") for line in lines)
    if in_doubt and not any(map(os.path.exists, images)):
        working = Path(os.path.abspath(""))
        others = [_resolve(line, (working,)) for line in lines]
        if any(map(os.path.exists, others)):
            where = f"at its lines from the working folder, not from the list's: {working}"
            return others, f"{listing}: the images are {where}"
    return images, ""


def _resolve(line: str, bases: Sequence[Path]) -> str:
    """Resolve a line of an image list against the first base where it exists, else the first.

    Backslashes are taken for Windows path separators, unless there is a file of exactly that name.
    """
    spellings = dict.fromkeys((line, line.replace("\\", "/")))
    places = [os.path.normpath(base / name) for name in spellings for base in bases]
    return next(filter(os.path.exists, places), places[0])


def _voc_sources(listing: Path, root: Path) -> list[Source]:
    """Return the images of `BASE/ImageSets/*/LIST.txt`, in `BASE/JPEGImages` with `BASE/Annotations`.

    The base of a list that lies elsewhere is the root.
    """
    base = _voc_base(listing, root)
    if os.path.isdir(listing):
        raise UserError("is a folder, not a list of images", listing, "layout 'voc' needs a list")
    image_folder, annotations = base / "JPEGImages", base / "Annotations"
    if not os.path.isdir(image_folder):
        raise UserError("the folder of the images is missing", image_folder, "layout 'voc' needs it")
    by_stem = {os.path.splitext(name)[0]: name for name in _image_names(image_folder)}
    sources = []
    for line in _lines(listing):
        stem = line if line in by_stem else _CLASS_FLAG.sub("", line)
        image = image_folder / by_stem.get(stem, f"{stem}.jpg")
        sources.append(Source(str(image), str(annotations / f"{stem}.xml")))
    return sources


def _image_names(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if is_image(name) and not is_hidden(name))
    except OSError as error:
        _refuse_folder(error)


def _voc_base(listing: Path, root: Path) -> Path:
    return next((p.parent for p in listing.parents if p.name == "ImageSets"), root)


def _lines(listing: Path) -> list[str]:
    try:
        text = read_regular(listing, _MAX_LIST_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        fix = "write one image path per line, in UTF-8"
        raise UserError(f"cannot be read as a list of images ({reason})", listing, fix) from error
    lines = lines_of(text)
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise UserError(
                "a NUL byte, which no file name has", f"{listing}:{number}", "write the list anew"
            )
    return [line.strip() for line in lines if line.strip()]
