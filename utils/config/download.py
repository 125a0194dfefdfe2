"""The `download:` section of a dataset YAML: the archives that make up the data, and their addresses.

It is treated purely as data. A command or code there, as in YAML files of other projects, is shown to
the user and never executed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from utils.config.settings import SettingsError, at_least, option, out_of_range, read_plain

Split = Literal["train", "val", "test", "unlabeled"]
KEY = "download"
SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_FILE_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,199}", re.ASCII)
_HEX = {"md5": 32, "sha256": 64}
_LONGEST = 120  # characters of a command that a message shows
Problem = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class ArchiveStep:
    """An archive to fetch and unpack."""

    url: tuple[str, ...] = option((), "addresses of the same file, tried in turn")
    file: str = option("", "its name on disk and on a mirror; left out, that in the first address")
    size: int = option(0, "exact size in bytes, where it is known", limits=at_least(0))
    about_mb: float = option(0.0, "size where it is not known exactly", limits=at_least(0))
    unpacked_mb: float = option(0.0, "size of what is in it, about", limits=at_least(0))
    md5: str = option("", "checksum, where one is known")
    sha256: str = option("", "checksum, where one is known")
    take: str = option("", "folder inside whose content is the data, patterns allowed; all where left out")
    into: str = option("", "folder under path: that it belongs into")
    gives: tuple[str, ...] = option((), "what is there under path: when it is unpacked")
    splits: tuple[Split, ...] = option((), "the splits that need it; all where left out")
    anywhere: bool = False  # for a bare address: the data may lie in the archive's only folder

    def __post_init__(self) -> None:
        """Raise SettingsError with all problems of the values."""
        found = _wrong_numbers(self)
        if not self.url:
            found.append(("url", "'url' is missing"))
        for address in self.url:
            found += [("url", what) for what in _address_problems(address)]
        if not found and not _FILE_NAME.fullmatch(self.name):
            found.append(("file", f"'{self.name}' is no name for a file, give one with 'file:'"))
        if not found and not self.name.lower().endswith(SUFFIXES):
            found.append(("file", f"'{self.name}' is not an archive of a known kind ({', '.join(SUFFIXES)})"))
        for key, length in _HEX.items():
            digest = getattr(self, key)
            if digest and not re.fullmatch(rf"[0-9a-fA-F]{{{length}}}", digest):
                found.append((key, f"'{key}' has {length} hexadecimal digits"))
        for key in ("take", "into"):
            found += [(key, what) for what in _path_problems(key, getattr(self, key))]
        found += [("gives", what) for entry in self.gives for what in _path_problems("gives", entry)]
        if found:
            raise SettingsError(found)

    @property
    def name(self) -> str:
        """The file's name on disk and on a mirror."""
        return self.file or (unquote(PurePosixPath(urlsplit(self.url[0]).path).name) if self.url else "")

    @property
    def bytes_about(self) -> int:
        """The exact or approximate size in bytes, 0 if unknown."""
        return self.size or round(self.about_mb * 1e6)


@dataclass(frozen=True, kw_only=True)
class CocoStep:
    """Label files to generate from COCO annotations that are part of the data."""

    coco: str = option("", "the annotations, under path:")
    pictures: str = option("", "folder of the images, under path:")
    labels: str = option("", "folder of the label files to make, under path:")
    list_file: str = option("", "list of the images to make, under path:")
    splits: tuple[Split, ...] = option((), "the splits that need it; all where left out")

    def __post_init__(self) -> None:
        """Raise SettingsError with all problems of the values."""
        found = _wrong_numbers(self)
        for key in ("coco", "pictures", "labels", "list_file"):
            value = getattr(self, key)
            found += [(key, what) for what in _path_problems(key, value)]
            if not value:
                found.append((key, f"'{key}' is missing"))
        if found:
            raise SettingsError(found)

    @property
    def gives(self) -> tuple[str, ...]:
        """The paths under `path:` that this step creates."""
        return self.labels, self.list_file


Step = ArchiveStep | CocoStep


@dataclass(frozen=True)
class Download:
    """How to get the data: steps that this project carries out, or a text that it only shows."""

    steps: tuple[Step, ...] = ()
    words: str = ""

    def steps_for(self, splits: tuple[str, ...]) -> tuple[Step, ...]:
        """Return the steps needed by any of the splits."""
        return tuple(step for step in self.steps if not step.splits or set(step.splits) & set(splits))

    def advice(self) -> str:
        """Return the text for a message, marked as shown only; empty if there is none."""
        text = " ".join(self.words.split())
        shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
        return f"its 'download:' is a text, which is shown and never run: {shown}" if text else ""


def read_download(value: Any) -> tuple[Download, list[Problem]]:
    """Parse `download:`; returns it and all problems as (key, what) pairs, with keys like `download.0.url`.

    Its value is a list of steps or a single one, the address of an archive, or a text.
    """
    if value is None or value == "":
        return Download(), []
    if isinstance(value, str):
        words = value.strip()
        if not _is_archive_address(words):
            return Download(words=words), []
        try:
            return Download((ArchiveStep(url=(words,), anywhere=True),)), []
        except SettingsError as error:
            return Download(), [(KEY, what) for _, what in error.problems]
    entries = [value] if isinstance(value, Mapping) else value
    if not isinstance(entries, list):
        return Download(), [(KEY, "'download' must be an address, or a list of steps with 'url:'")]
    steps, found = [], []
    for number, entry in enumerate(entries):
        place = KEY if isinstance(value, Mapping) else f"{KEY}.{number}"
        step, problems = _read_step(entry)
        found += [(f"{place}.{key}" if key else place, what) for key, what in problems]
        if step is not None:
            steps.append(step)
    return Download(tuple(steps)), found


def _read_step(entry: Any) -> tuple[Step | None, list[Problem]]:
    if not isinstance(entry, Mapping):
        return None, [("", "a step of 'download' has lines such as 'url: https://...'")]
    kind: type[Step] = CocoStep if "coco" in entry else ArchiveStep
    values, problems = read_plain(kind, {str(key): value for key, value in entry.items()})
    try:
        return kind(**values), problems
    except SettingsError as error:
        named = {key for key, _ in problems}
        return None, problems + [(key, what) for key, what in error.problems if key not in named]


def _wrong_numbers(step: Step) -> list[Problem]:
    return [(setting.name, f"{setting.name}: {value} {what}") for setting, value, what in out_of_range(step)]


def _is_archive_address(text: str) -> bool:
    """Return whether a text is just the address of an archive, not a command that contains one."""
    return (
        re.fullmatch(r"https?://\S+", text) is not None
        and _split(text) is not None
        and urlsplit(text).path.lower().endswith(SUFFIXES)
    )


def _split(text: str) -> Any:
    """Return the parts of an address, None if it is invalid."""
    try:
        return urlsplit(text)
    except ValueError:
        return None


def _address_problems(address: str) -> Iterator[str]:
    parts = _split(address)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        yield f"'{address[:_LONGEST]}' is not an address of http:// or https://"
    elif parts.username is not None:
        yield "an address must not hold a user or a password"


def _path_problems(key: str, text: str) -> Iterator[str]:
    parts = text.split("/")
    leads_out = text.startswith(("/", "~")) or "\\" in text or "\0" in text
    if text and (leads_out or not {"..", "."}.isdisjoint(parts) or "" in parts):
        yield f"'{key}' must lead to a place under path:, without '..', not to '{text[:_LONGEST]}'"
