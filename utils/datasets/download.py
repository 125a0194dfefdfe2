"""Download the data of a dataset YAML if it is missing: python -m utils.datasets.download data/voc.yaml

Archives are fetched, verified, unpacked beside the dataset's folder and moved into it; existing files
are neither fetched again nor changed. Nothing in the YAML is ever executed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from utils.config.cli import exit_code_of
from utils.config.dataset import SPLITS, DatasetConfig, load_dataset_config, missing_data
from utils.config.download import ArchiveStep, CocoStep, Step
from utils.config.files import refusals, write_text_atomically
from utils.config.suggestions import nearest_path
from utils.datasets.coco_json import read_coco
from utils.datasets.sources import is_split_there, list_sources
from utils.errors import UserError
from utils.fetch.lock import exclusive_lock
from utils.fetch.part import check_room
from utils.fetch.transfer import FETCH_INTERRUPTED, Remote, check_content, fetch
from utils.fetch.unpack import move_in, unpack
from utils.fetch.web import SourceError
from utils.words import counted

Say = Callable[[str], None]
_SLACK = 1.5  # factor by which an archive may unpack to more than its YAML says
_FLOOR = 64 * 2**20


def get_dataset(
    path: str | Path, data_dir: str | Path | None, splits: Sequence[str], may_fetch: bool, say: Say
) -> DatasetConfig:
    """Return the settings of a dataset, downloading whatever is missing of the given splits.

    Data in a `data_dir` is the user's own copy: nothing is downloaded into it.

    Raises:
        UserError: if something is missing and cannot or must not be downloaded.
    """
    config = load_dataset_config(path, data_dir, may_be_absent=True)
    missing = missing_splits(config, splits)
    if missing and config.download.steps:
        if data_dir is not None or not may_fetch:
            raise _not_fetched(config, missing[0], data_dir, may_fetch)
        fetch_dataset(config, missing, say)
    config = load_dataset_config(path, data_dir)
    for split in missing_splits(config, splits):
        list_sources(config, split, lambda _: None)  # says what is missing before other splits are read
    if config.note:
        say(config.note)
    return config


def missing_splits(config: DatasetConfig, splits: Sequence[str]) -> list[str]:
    """Return those of the splits that the YAML names and that are missing or incomplete."""
    return [split for split in splits if split in config.splits and not is_split_there(config, split)]


def fetch_dataset(config: DatasetConfig, splits: Sequence[str], say: Say, keep: bool = False) -> None:
    """Download what is missing of the splits, once if several processes call this.

    keep: leave the archives beside the dataset's folder.

    Raises:
        UserError: if the download fails, the disk is too full, or the result is not what the YAML says.
    """
    place = _Place(config, say, keep)
    wait = f"another process is fetching {config.root}: waiting for it"
    try:
        with exclusive_lock(place.work / ".lock", lambda: say(wait)):
            splits = missing_splits(config, splits)  # another process may have fetched them meanwhile
            needed = config.download.steps_for(tuple(splits)) if splits else ()
            steps = [step for step in needed if place.is_needed(step)]
            place.check_room(steps)
            for step in steps:
                if isinstance(step, ArchiveStep):
                    place.add_archive(step)
                else:
                    place.add_labels(step)
    finally:
        place.tidy()
    still = missing_splits(config, splits)
    if still:
        raise UserError(
            f"all of its archives are there, but split '{still[0]}' is not what the YAML says: "
            f"{', '.join(str(entry) for entry in config.splits[still[0]])}",
            config.yaml_path,
            f"look into {config.root} and at 'download:'",
        )


@dataclass
class _Place:
    """A dataset's folder, and the working folder beside it for downloading and unpacking."""

    config: DatasetConfig
    say: Say
    keep: bool

    def __post_init__(self) -> None:
        # Resolve links, so that everything is on one file system and a rename is atomic.
        self.root = Path(os.path.realpath(self.config.root))
        self.work = self.root.parent / f"{self.root.name}.download"
        if os.path.isdir(self.root) and os.stat(self.root).st_dev != os.stat(self.root.parent).st_dev:
            self.work = self.root / ".download"
        self.is_new = not os.path.exists(self.root.parent)

    def is_needed(self, step: Step) -> bool:
        """Return whether the results of a step are missing; always True if it does not name them."""
        return not step.gives or not all(os.path.exists(self.root / entry) for entry in step.gives)

    def by_hand(self, step: ArchiveStep) -> Path:
        """Return where the user may put an archive: beside the dataset's folder."""
        return self.config.root.parent / step.name

    def check_room(self, steps: Sequence[Step]) -> None:
        """Announce what will be downloaded and check the free disk space.

        Raises:
            UserError: if the disk is too full.
        """
        archives = [step for step in steps if isinstance(step, ArchiveStep)]
        if not archives:
            return
        to_fetch = [step for step in archives if not os.path.isfile(self.by_hand(step))]
        coming = sum(step.bytes_about for step in to_fetch)
        unpacked = sum(round(step.unpacked_mb * 1e6) for step in archives)
        # Each archive is deleted once unpacked, so they never all take up space at once.
        largest = coming if self.keep else max(step.bytes_about for step in archives)
        size = f"{coming / 1e6:,.0f} MB" if coming else "of unknown size"
        of_them = f"{counted(len(to_fetch), 'archive')}, {size}"
        if to_fetch:
            self.say(f"{self.config.yaml_path}: fetching what is missing into {self.config.root}: {of_them}")
        with refusals("cannot be written", self.work):
            self.work.mkdir(parents=True, exist_ok=True)
        there = sum(entry.stat().st_size for entry in self.work.glob("*.part"))
        check_room(self.work, max(largest + unpacked - there, 0), str(self.config.yaml_path))

    def add_archive(self, step: ArchiveStep) -> None:
        """Download an archive, or use one that the user has put there, and move its content in."""
        given, target = self.by_hand(step), self.work / step.name
        remote = Remote(step.name, step.url, step.size, step.md5, step.sha256)
        if os.path.isfile(given):
            self.say(f"taking {given}")
            try:
                check_content(remote, given)
                self._unpack(step, given)
            except SourceError as error:
                raise UserError(str(error), given, "remove it, then it is fetched anew") from error
        else:
            fetch(remote, target, lambda part: self._unpack(step, part), given)
        self._move_in(step)
        if os.path.isfile(target):
            with refusals("cannot be written", given):
                if self.keep:
                    os.replace(target, given)
                else:
                    target.unlink()

    def _unpack(self, step: ArchiveStep, archive: Path) -> None:
        folder = self._unpacked(step)
        shutil.rmtree(folder, ignore_errors=True)  # left by a killed process
        limit = max(round(step.unpacked_mb * 1e6 * _SLACK), _FLOOR) if step.unpacked_mb else 0
        try:
            unpack(archive, step.name, folder, step.take, limit)
            missing = [entry for entry in step.gives if not self._will_be_there(step, entry)]
            if missing:
                raise SourceError(f"it does not hold {missing[0]}")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _unpacked(self, step: ArchiveStep) -> Path:
        return self.work / f"{step.name}.unpacked"

    def _will_be_there(self, step: ArchiveStep, entry: str) -> bool:
        inner = os.path.relpath(entry, step.into) if step.into else entry
        is_inside = not inner.startswith("..") and os.path.exists(self._unpacked(step) / inner)
        return is_inside or os.path.exists(self.root / entry)

    def _move_in(self, step: ArchiveStep) -> None:
        source = self._unpacked(step)
        if step.anywhere:
            source = self._folder_with_splits(source)
        move_in(source, self.root / step.into, [self.root / entry for entry in step.gives])
        shutil.rmtree(self._unpacked(step), ignore_errors=True)

    def _folder_with_splits(self, source: Path) -> Path:
        """Return the unpacked folder, or its only subfolder if that contains the data."""
        inside = list(source.iterdir())
        ways = [
            os.path.relpath(entry, self.config.root) for way in self.config.splits.values() for entry in way
        ]
        if len(inside) == 1 and inside[0].is_dir() and any((inside[0] / way).exists() for way in ways):
            return inside[0]
        return source

    def add_labels(self, step: CocoStep) -> None:
        """Write the label files and the image list of a COCO annotation file, where they are missing."""
        annotations, labels, listing = (self.root / way for way in (step.coco, step.labels, step.list_file))
        self.say(f"making the labels of {step.coco}")
        found = read_coco(annotations, self.config.names)
        for note in found.notes:
            self.say(note)
        for image in found.images:
            if "images" in PurePosixPath(image.name).parts[:-1]:
                what = (
                    f"its image {image.name} has a folder 'images' in its name: its label would not be found"
                )
                raise UserError(what, annotations, "rename the folder")
        if not os.path.exists(labels):
            ready = self.work / f"{labels.name}.labels"
            shutil.rmtree(ready, ignore_errors=True)
            with refusals("cannot be written", ready):
                for image in found.images:
                    file = (ready / image.name).with_suffix(".txt")
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text("".join(f"{line}\n" for line in image.lines), encoding="utf-8")
            move_in(ready, labels)
        if not os.path.lexists(listing):
            lines = "".join(f"./{step.pictures}/{image.name}\n" for image in found.images)
            write_text_atomically(listing, lines)

    def tidy(self) -> None:
        """Remove the working folder, unless it still holds files that a later attempt can use."""
        try:
            self.work.rmdir()
            if self.is_new:
                self.root.parent.rmdir()
        except OSError:
            pass


def _not_fetched(
    config: DatasetConfig, split: str, data_dir: str | Path | None, may_fetch: bool
) -> UserError:
    error = missing_data(config.yaml_path, list(config.splits[split]), config.download, f"split '{split}'")
    if data_dir is not None:
        command = f"python -m utils.datasets.download {config.yaml_path} --data-dir {data_dir}"
        near = nearest_path(data_dir)
        meant = f"did you mean {near}? Else correct" if near else "correct"
        return UserError(error.what, error.where, f"{meant} --data-dir, or fetch it there: {command}")
    reason = "" if may_fetch else "leave out what forbids to fetch it (--no-download or --dry-run), or "
    return UserError(error.what, error.where, f"{reason}{error.fix}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m utils.datasets.download", description="Gets the data of a dataset YAML."
    )
    parser.add_argument("data", type=Path, help="dataset YAML")
    parser.add_argument("--data-dir", type=Path, help="folder for the data, in place of the YAML's path")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, help="only what these need (default: all)")
    parser.add_argument("--keep", action="store_true", help="leave the archives beside the data's folder")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = _arguments(argv)

    def fetch() -> None:
        config = load_dataset_config(arguments.data, arguments.data_dir, may_be_absent=True)
        splits = arguments.splits or list(config.splits)
        missing = missing_splits(config, splits)
        if missing and not config.download.steps:
            raise missing_data(config.yaml_path, [config.root], config.download, f"split '{missing[0]}'")
        if missing:
            fetch_dataset(config, missing, lambda text: print(text, flush=True), arguments.keep)
        done = "fetched into" if missing else "is there in"
        print(f"{config.yaml_path}: {', '.join(splits)} {done} {config.root}")

    return exit_code_of(fetch, interrupted=FETCH_INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
