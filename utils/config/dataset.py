"""Dataset settings: images, labels and class names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from utils.config.addresses import refuse_address
from utils.config.download import KEY as DOWNLOAD
from utils.config.download import SUFFIXES as ARCHIVE_SUFFIXES
from utils.config.download import Download, read_download
from utils.config.schema import load_yaml
from utils.config.suggestions import did_you_mean, near_files, nearest_path, question
from utils.errors import UserError

Layout = Literal["yolo", "voc"]
ROOT = Path(__file__).resolve().parents[2]
_SHIPPED = ROOT / "data"
_YAML_SUFFIXES = (".yaml", ".yml")
_OF_ARCHIVES = "unpack it and give its dataset YAML, or write one with the archive's address as 'download:'"
SPLITS = ("train", "val", "test", "unlabeled")
# Found in exports of labelling services; they say nothing about the data itself.
_REMARKS = frozenset({"roboflow", "description", "license", "author", "version", "url"})
_KEYS = frozenset({"path", "layout", "names", "nc", DOWNLOAD, *SPLITS})


@dataclass(frozen=True)
class DatasetConfig:
    """A validated dataset YAML with absolute paths.

    root: the folder that holds the data.
    splits: the entries of each split that the YAML names: image folders or lists (layout
        `yolo`), `ImageSets` lists (layout `voc`). They need not exist yet: see `entries`.
    names: class names, in the order of their ids.
    download: how to get the data; nothing of it is ever executed.
    remarks: oddities of the YAML that may be intended, for the console. note: where the data was found,
        if not where the YAML says.
    """

    yaml_path: Path
    root: Path
    layout: Layout
    splits: dict[str, tuple[Path, ...]]
    names: list[str]
    nc: int
    download: Download
    remarks: tuple[str, ...] = ()
    note: str = ""

    def entries(self, split: str) -> tuple[Path, ...]:
        """Return the folders and lists of a split, all of which exist.

        Raises:
            UserError: if the YAML has no such split or part of it is missing.
        """
        if split not in self.splits:
            have = ", ".join(self.splits) or "none"
            raise UserError(f"has no split '{split}' (it has: {have})", self.yaml_path, f"add '{split}:'")
        missing = [entry for entry in self.splits[split] if not os.path.exists(entry)]
        if missing:
            raise missing_data(self.yaml_path, missing, self.download, f"split '{split}'")
        return self.splits[split]


def load_dataset_config(
    path: str | Path, data_dir: str | Path | None = None, *, may_be_absent: bool = False
) -> DatasetConfig:
    """Load and validate the settings of a dataset.

    The YAML's `path` is resolved against the folder of the YAML. If it is a list, the first folder that
    has the train and val splits is used, else the first that exists, else, with `may_be_absent`, the first.
    The working folder, against which YOLOv5 resolves it, comes last: it is used only if the splits are
    there and not in the other places. Splits are resolved against the root, image lists also against the
    folder of the YAML. `data_dir` overrides `path`. Without either the root is the folder of the YAML, or
    the working folder if only that has the data.

    Raises:
        UserError: with all problems of the file, or if the data is not found.
    """
    path = _find_yaml(Path(path))
    data, lines = load_yaml(path)
    _refuse(_problems(data), path, lines)
    names = _names_in_order(data["names"])
    download, _ = read_download(data.get(DOWNLOAD))
    note = ""
    if data_dir or data.get("path"):
        candidates = _candidates(path, data.get("path", "."), data_dir)
        others = [] if data_dir else [_absolute(Path(entry)) for entry in _as_list(data["path"])]
        root = _find_root(path, data, candidates, others)
        if root is None and not may_be_absent:
            raise missing_data(path, candidates, download, "the data", data_dir)
        root = root or candidates[0]
        if root not in candidates:
            note = f"{path}: the data is at 'path' from the working folder, not from the YAML's: {root}"
    else:
        entries = [entry for split in SPLITS for entry in _as_list(data.get(split) or [])]
        root = _root_of_entries(path, entries)
    layout: Layout = "voc" if data.get("layout") == "voc" else "yolo"
    splits = {
        split: tuple(_resolve(root, entry, path.parent) for entry in _as_list(data[split]))
        for split in SPLITS
        if data.get(split)
    }
    doubles = _doubles(names)
    remarks = (f"{path}: class names appear twice: {doubles}",) if doubles else ()
    return DatasetConfig(path, root, layout, splits, names, len(names), download, remarks, note)


def load_names(path: str | Path) -> list[str]:
    """Load the class names of a dataset YAML; the data itself need not exist.

    Raises:
        UserError: if the file is invalid.
    """
    path = _find_yaml(Path(path))
    data, lines = load_yaml(path)
    _refuse(_names_problems(data), path, lines)
    return _names_in_order(data["names"])


def _find_yaml(path: Path) -> Path:
    """Find a YAML relative to the working folder or the project's, else by name among the shipped ones.

    The names of shipped files are case-insensitive. The suffix may be left out.
    """
    is_archive = path.name.lower().endswith(ARCHIVE_SUFFIXES)
    refuse_address(path, *((_OF_ARCHIVES,) if is_archive else ()))
    if is_archive:
        raise UserError("is an archive, not a dataset YAML", path, _OF_ARCHIVES)
    named = path.with_name(f"{path.name}.yaml") if path.name and not path.suffix else path
    for own in (path, named):
        if os.path.exists(own):
            return own
    shipped = {file.name.casefold(): file for file in sorted(_SHIPPED.glob("*.yaml")) if not _is_hyp(file)}
    tried = [ROOT / path]
    if os.path.exists(tried[0]):
        return tried[0]
    if path.parent in (Path(), Path("data")) and path.suffix in ("", *_YAML_SUFFIXES):
        tried.append(_SHIPPED / path.with_suffix(".yaml").name)
        if found := shipped.get(tried[-1].name.casefold()):
            return found
    near = near_files(path.with_suffix(".yaml"), (Path("data", file.name) for file in shipped.values()))
    places = " nor ".join(str(place) for place in dict.fromkeys(tried) if place != path)
    raise UserError(
        "is not there" + (f", nor is {places}" if places else ""),
        path,
        question(near, "give the path of a dataset YAML"),
    )


def _is_hyp(file: Path) -> bool:
    return file.name.startswith("hyp.")


def _refuse(problems: list[tuple[str, str]], path: Path, lines: dict[str, int]) -> None:
    """Raise UserError with all problems, each with the line of its key; does nothing if there are none."""
    if problems:
        raise UserError("; ".join(_with_line(key, text, lines) for key, text in problems), path)


def _with_line(key: str, text: str, lines: dict[str, int]) -> str:
    """Prefix a problem with its line; a missing key gets the line of the mapping that lacks it."""
    while key and key not in lines:
        key = key.rpartition(".")[0]
    return f"line {lines[key]}: {text}" if key else text


def _problems(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return all problems of the settings as (key, what) pairs."""
    found = [(key, _unknown(key)) for key in data if key not in _KEYS | _REMARKS]
    if data.get("layout", "yolo") not in ("yolo", "voc"):
        found.append(("layout", f"layout '{data['layout']}' is neither 'yolo' nor 'voc'"))
    if not any(data.get(split) for split in SPLITS):
        found.append(("", "names no split: needs 'train:' and 'val:'"))
    for key in ("path", *SPLITS):
        if key in data and data[key] is not None and not _is_text(data[key]):
            found.append((key, f"'{key}' must be a path or a list of paths"))
    return found + read_download(data.get(DOWNLOAD))[1] + _names_problems(data)


def _names_problems(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = data.get("names")
    if names is None:
        return [("", "has no class names: needs 'names: [first, second, ...]'")]
    if isinstance(names, Mapping):
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            return [("names", f"the ids of 'names' must run from 0 to {len(names) - 1} without a gap")]
    elif not isinstance(names, list):
        return [("names", "'names' must be a list or 'id: name' lines")]
    if not names:
        return [("names", "'names' is empty")]
    found = []
    entries = names.values() if isinstance(names, Mapping) else names
    if any(isinstance(entry, bool) for entry in entries):
        found.append(("names", "yes, no, on, off and the like are not text in YAML: quote it, as in 'yes'"))
    elif not all(isinstance(entry, str | int | float) for entry in entries):
        found.append(("names", "every class name must be text"))
    elif data.get("layout") == "voc" and (doubles := _doubles(_names_in_order(names))):
        found.append(("names", f"class names appear twice, annotations cannot tell them apart: {doubles}"))
    if data.get("nc") is not None and data["nc"] != len(names):
        found.append(("nc", f"nc is {data['nc']} but 'names' has {len(names)} entries"))
    return found


def _names_in_order(names: Mapping[Any, Any] | list[Any]) -> list[str]:
    if isinstance(names, Mapping):
        return [str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    return [str(name) for name in names]


def _doubles(names: list[str]) -> str:
    """Return the names that appear more than once, joined by commas."""
    return ", ".join(name for name, count in Counter(names).items() if count > 1)


def _unknown(key: object) -> str:
    return f"unknown key '{key}'{did_you_mean(str(key), sorted(_KEYS))}"


def _is_text(value: object) -> bool:
    entries = value if isinstance(value, list) else [value]
    return bool(entries) and all(isinstance(entry, str) and entry for entry in entries)


def _as_list(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]


def _candidates(yaml_path: Path, value: str | list[str], data_dir: str | Path | None) -> list[Path]:
    """Return the folders that may hold the data, in order of preference."""
    # Not Path.expanduser, which fails for `~name` if there is no such user.
    if data_dir:
        places = [Path(os.path.expanduser(data_dir))]
    else:
        places = [yaml_path.parent / os.path.expanduser(entry) for entry in _as_list(value)]
    # Not Path.resolve: a link to the data keeps the name that the user knows.
    return [_absolute(place) for place in places]


def _find_root(
    yaml_path: Path, data: Mapping[str, Any], candidates: list[Path], others: list[Path]
) -> Path | None:
    """Return the first folder with complete train and val splits, else the first existing candidate."""
    entries = [entry for split in ("train", "val") for entry in _as_list(data.get(split) or [])]
    there = [place for place in candidates if os.path.isdir(place)]
    for place in (*there, *filter(os.path.isdir, others)):
        if all(os.path.exists(_resolve(place, entry, yaml_path.parent)) for entry in entries):
            return place
    return there[0] if there else None


def _root_of_entries(yaml_path: Path, entries: list[str]) -> Path:
    """Return the folder of the YAML, or the working folder if only that has any of the entries.

    YAML files from before `path:` was introduced are relative to the working folder.
    """
    for root in (yaml_path.parent, Path()):
        if any(os.path.exists(_resolve(root, entry, root)) for entry in entries):
            return _absolute(root)
    return _absolute(yaml_path.parent)


def _resolve(root: Path, entry: str, beside: Path) -> Path:
    """Resolve a split's entry against the root; a list may also lie in the YAML's folder, `beside`.

    `../train` is also tried as `train`, as some exports write it.
    """
    wanted = Path(os.path.expanduser(entry))
    places = [root / wanted]
    if entry.startswith("../"):
        places.append(root / entry.removeprefix("../"))
    if wanted.suffix == ".txt":
        places.append(beside / wanted)
    found = (place for place in places if os.path.exists(_absolute(place)))
    return _absolute(next(found, places[0]))


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def missing_data(
    yaml_path: Path,
    looked_for: list[Path],
    download: Download,
    what: str,
    data_dir: str | Path | None = None,
) -> UserError:
    """Return the error for missing data, with all ways to get it or the path likely meant by `data_dir`."""
    tried = " or ".join(str(path) for path in looked_for)
    fix = "point at your copy with --data-dir DIR or 'path:', which is relative to the YAML's folder"
    if download.steps:
        fix = f"fetch it (python -m utils.datasets.download {yaml_path}) or {fix}"
    elif download.words:
        fix = f"get it ({download.advice()}) or {fix}"
    if data_dir and (near := nearest_path(data_dir)):
        fix = f"did you mean --data-dir {near}?"
    return UserError(f"{what} is not there: looked for {tried}", yaml_path, fix)
