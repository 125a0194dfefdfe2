"""Convert annotated data to the YOLO layout, with a dataset YAML that is ready for training:

    python -m utils.datasets.convert voc data/bccd.yaml --out datasets/bccd-yolo
    python -m utils.datasets.convert voc VOCdevkit/VOC2007 --out datasets/voc2007-yolo
    python -m utils.datasets.convert coco instances_train.json instances_val.json --images DIR --out DIR

Everything goes into a new folder; the source is only read. This project can train on the VOC layout without
conversion.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from utils.bars import ProgressBar
from utils.config.cli import exit_code_of
from utils.config.dataset import SPLITS, DatasetConfig, load_dataset_config
from utils.config.download import Download
from utils.config.files import refusals, temporary_folder
from utils.config.schema import yaml_text
from utils.config.signals import sigterm_as_interrupt
from utils.datasets.annotations import label_bytes, normalised, parse_annotation
from utils.datasets.coco_json import read_coco
from utils.datasets.index import checked_size, in_parallel
from utils.datasets.sources import Source, list_sources
from utils.datasets.voc import AnnotationError, object_names
from utils.errors import UsageError, UserError
from utils.words import counted, first_of

YAML_NAME = "dataset.yaml"
_LISTS = ("train", "val", "test")
_SHOWN = 5


@dataclass(frozen=True)
class Item:
    """An image to convert: its file, its path within the split's folder, its label lines."""

    image: Path
    name: str
    lines: list[str]


@dataclass
class Converted:
    """Converted data: the images of each split, the class names, and notes on what was left out.

    Identical splits share one list.
    """

    names: list[str]
    splits: dict[str, list[Item]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def from_voc(config: DatasetConfig) -> Converted:
    """Convert a dataset in VOC layout, leaving out objects marked `difficult`, as training does.

    Raises:
        UserError: if annotations are invalid; names the first few.
    """
    found = Converted(list(config.names))
    for split, entries in config.splits.items():
        if twin := next((other for other in found.splits if config.splits[other] == entries), None):
            found.splits[split] = found.splits[twin]
            continue
        sources = list_sources(config, split)
        sizes = in_parallel(checked_size, sources, f"reading {split}")
        wrong: list[str] = []
        items = []
        for source, size in zip(sources, sizes, strict=True):
            if isinstance(size, str):
                found.notes.append(f"{source.image}: {size}, left out")
                continue
            has_truth = split != "unlabeled"
            lines = _voc_lines(source, size, config, found.notes, wrong) if has_truth else []
            items.append(Item(Path(source.image), Path(source.image).name, lines))
        if wrong:
            what = f"{counted(len(wrong), 'wrong annotation')}: {first_of(wrong, _SHOWN)}"
            raise UserError(what, config.yaml_path, "fix them")
        found.splits[split] = items
    return found


def voc_folder(folder: Path, names: Sequence[str]) -> DatasetConfig:
    """Return the settings of a folder in VOC layout, or of one that holds several, such as VOCdevkit.

    The splits are the lists train, val and test; without a train list, trainval is used for train.
    names: if empty, all class names that appear, in alphabetical order.

    Raises:
        UserError: if the folder is not in VOC layout, has no such lists, or, without `names`, no object.
    """
    places = (folder, *sorted(folder.glob("*")))
    bases = [base for base in places if os.path.isdir(base / "ImageSets" / "Main")]
    if not bases:
        what = "is neither a YAML nor in VOC layout: ImageSets/Main is missing"
        raise UserError(what, folder, "name the folder that holds ImageSets, or a dataset YAML")
    lists = {
        split: tuple(path for base in bases if os.path.isfile(path := base / f"ImageSets/Main/{split}.txt"))
        for split in (*_LISTS, "trainval")
    }
    trainval = lists.pop("trainval")
    if not lists["train"]:
        lists["train"] = trainval
    splits = {split: paths for split, paths in lists.items() if paths}
    if not splits:
        what = "has no lists train.txt, val.txt, test.txt or trainval.txt"
        raise UserError(what, bases[0] / "ImageSets/Main", "add at least one, with an image name a line")
    config = DatasetConfig(folder, folder, "voc", splits, list(names), len(names), Download())
    if names:
        return config
    found = sorted(
        {name for split in splits for source in list_sources(config, split) for name in _names(source)}
    )
    if not found:
        raise UserError("no annotation has an object", folder, "name the classes with --names")
    return DatasetConfig(folder, folder, "voc", splits, found, len(found), Download())


def from_coco(paths: Sequence[Path], splits: Sequence[str], images: Path, segments: bool) -> Converted:
    """Convert annotation files in COCO's format, one per split.

    images: the image folder, or the parent of folders named after the annotation files.

    Raises:
        UserError: if a file is invalid, has other classes than the first, or none of its images exists.
    """
    found: Converted | None = None
    for path, split in zip(paths, splits, strict=True):
        content = read_coco(path, segments=segments)
        found = found or Converted(content.names)
        if content.names != found.names:
            raise UserError(f"has other classes than {paths[0]}", path, "convert them one by one")
        folder = _folder_of_images(images, path, [image.name for image in content.images])
        items = [Item(folder / image.name, image.name, image.lines) for image in content.images]
        missing = [item for item in items if not os.path.isfile(item.image)]
        found.notes += [*content.notes, *(f"{item.image}: is not there, left out" for item in missing)]
        found.splits[split] = [item for item in items if os.path.isfile(item.image)]
    assert found is not None, "there is at least one"
    return found


def _check_new(out: Path) -> None:
    """Raise UserError if `out` already exists, unless it is an empty folder."""
    if os.path.isdir(out) and any(out.iterdir()) or (os.path.lexists(out) and not os.path.isdir(out)):
        raise UserError("is there already", out, "name a new folder with --out")


def write_yolo(found: Converted, out: Path, link: bool) -> Path:
    """Write images, labels and YAML into a new folder, all or nothing; returns the path of the YAML.

    link: create symbolic links to the source images instead of copies.

    Raises:
        UserError: if the folder already exists or cannot be written.
    """
    _check_new(out)
    with (
        refusals("cannot be written", out),
        temporary_folder(out) as made,
        ProgressBar(None, _count(found), "writing", unit=" images") as bar,
    ):
        folders: dict[str, str] = {}
        for split, items in found.splits.items():
            twin = next((other for other in folders if found.splits[other] is items), split)
            folders[split] = f"images/{twin}"
            if twin != split:
                continue
            for item, name in zip(items, _names_without_doubles(items), strict=True):
                _write_item(item, made / "images" / split / name, made / "labels" / split, name, link)
                bar.update()
        settings = {"path": ".", **folders}
        text = yaml_text({**settings, "nc": len(found.names), "names": found.names})
        (made / YAML_NAME).write_text(text, encoding="utf-8")
        os.replace(made, out)
    return out / YAML_NAME


def _write_item(item: Item, image: Path, labels: Path, name: str, link: bool) -> None:
    label = (labels / name).with_suffix(".txt")
    for folder in (image.parent, label.parent):
        folder.mkdir(parents=True, exist_ok=True)
    if link:
        image.symlink_to(os.path.abspath(item.image))
    else:
        shutil.copyfile(item.image, image)
    label.write_text("".join(f"{line}\n" for line in item.lines), encoding="utf-8")


def _names_without_doubles(items: Sequence[Item]) -> Iterator[str]:
    """Yield a name for each item, numbered where two would otherwise share a label file.

    Folders `images` in a name are left out: labels are looked for beside the last one of a path.
    """
    taken: set[str] = set()
    numbers: dict[str, int] = {}  # the last one given to a name: counting from 2 each time would be quadratic
    for item in items:
        name = PurePosixPath(*(part for part in PurePosixPath(item.name).parts if part != "images"))
        path, key = name, str(name.with_suffix("")).casefold()
        while str(path.with_suffix("")).casefold() in taken:
            numbers[key] = numbers.get(key, 1) + 1
            path = name.with_stem(f"{name.stem}-{numbers[key]}")
        taken.add(str(path.with_suffix("")).casefold())
        yield str(path)


def _voc_lines(
    source: Source, size_wh: tuple[int, int], config: DatasetConfig, notes: list[str], wrong: list[str]
) -> list[str]:
    content = label_bytes(source)
    if content is None:
        notes.append(f"{source.image}: has no annotation, counts as background")
        return []
    annotation, mistakes = parse_annotation(content, "voc", config.names)
    wrong += [f"{source.label}:{line}: {what}" for line, what in mistakes]
    labels, corrections = normalised(annotation, size_wh)
    notes += [f"{source.label}: {what}" for what in corrections]
    return [" ".join((str(int(row[0])), *(f"{number:.6f}" for number in row[1:]))) for row in labels.tolist()]


def _names(source: Source) -> set[str]:
    try:
        return object_names(label_bytes(source) or b"<annotation/>")
    except AnnotationError as error:
        raise UserError(error.what, f"{source.label}:{error.line}", "fix it") from error


def _folder_of_images(images: Path, annotations: Path, names: Sequence[str]) -> Path:
    """Find the folder that holds the images of an annotation file.

    Raises:
        UserError: if none of the images is in any of the usual places.
    """
    part = annotations.stem.removeprefix("instances_")
    folders = [images, images / part, images / "images" / part, images / "images"]
    for folder in folders:
        if any(os.path.isfile(folder / name) for name in names):
            return folder
    tried = " nor ".join(map(str, folders))
    raise UserError(
        f"none of its {len(names)} images is in {tried}", annotations, "name their folder: --images"
    )


def _split_of(path: Path) -> str:
    near = [split for split in _LISTS if split in path.stem.lower()]
    if len(near) != 1:
        raise UsageError(
            f"it is not clear which split {path.name} is", "--splits", "name them: train val test"
        )
    return near[0]


def _count(found: Converted) -> int:
    return sum(len(items) for items in {id(items): items for items in found.splits.values()}.values())


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m utils.datasets.convert", description="Turns annotated data into the YOLO layout."
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    voc = kinds.add_parser("voc", help="from PASCAL VOC layout")
    voc.add_argument("source", type=Path, help="dataset YAML with 'layout: voc', or a folder in that layout")
    voc.add_argument("--data-dir", type=Path, help="folder with the data, in place of the YAML's path")
    voc.add_argument("--names", nargs="+", default=(), help="classes of a folder (default: all that appear)")
    coco = kinds.add_parser("coco", help="from annotations in COCO's format")
    coco.add_argument("source", type=Path, nargs="+", help="annotation files, one a split")
    coco.add_argument("--images", type=Path, required=True, help="folder of the images")
    coco.add_argument("--splits", nargs="+", choices=SPLITS, help="of the files (default: by their names)")
    coco.add_argument("--segments", action="store_true", help="write outlines instead of boxes")
    for kind in (voc, coco):
        kind.add_argument("--out", type=Path, required=True, help="the new folder")
        kind.add_argument("--link", action="store_true", help="link the images instead of copying them")
    return parser.parse_args(argv)


def _read(arguments: argparse.Namespace) -> Converted:
    source = arguments.source
    if arguments.kind == "voc":
        if os.path.isdir(source):
            return from_voc(voc_folder(source, arguments.names))
        config = load_dataset_config(source, arguments.data_dir)
        if config.layout != "voc":
            raise UserError("its data is in YOLO layout already", config.yaml_path, "train with it as it is")
        return from_voc(config)
    splits = arguments.splits or [_split_of(path) for path in source]
    if len(set(splits)) != len(source):
        raise UsageError(
            f"{counted(len(source), 'file')} and the splits {' '.join(splits)}", "--splits", "name one a file"
        )
    return from_coco(source, splits, arguments.images, arguments.segments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = _arguments(argv)

    def convert() -> None:
        _check_new(arguments.out)  # fail before minutes of reading
        found = _read(arguments)
        with sigterm_as_interrupt():
            yaml_path = write_yolo(found, arguments.out, arguments.link)
        for note in found.notes[:_SHOWN]:
            print(f"remark: {note}")
        if len(found.notes) > _SHOWN:
            print(f"remark: and {len(found.notes) - _SHOWN} more")
        for split, items in found.splits.items():
            boxes = sum(len(item.lines) for item in items)
            empty = sum(not item.lines for item in items)
            print(f"{split}: {counted(len(items), 'image')}, {counted(boxes, 'object')}, {empty} without any")
        missing = [split for split in ("train", "val") if split not in found.splits]
        if missing:
            without = " and no ".join(missing)
            print(f"written to {yaml_path}; it is not enough to train, as there is no {without}")
        else:
            print(f"written to {arguments.out}: python train.py --data {yaml_path}")

    return exit_code_of(convert)


if __name__ == "__main__":
    sys.exit(main())
