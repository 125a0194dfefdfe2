"""Suggestions for typos: the names, values and files closest to one that does not exist."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path

NEARNESS = 0.6  # similarity cutoff of difflib, 0..1
_SHOWN = 3
_MISTAKES = 2  # mistyped parts of a path; with more it is a different path
_MANY = 10_000  # entries of a folder that are considered


def near_names(name: str, known: Iterable[str], count: int = _SHOWN, nearness: float = NEARNESS) -> list[str]:
    """Return the known names closest to one, the closest first; ignores case."""
    folded = {entry.casefold(): entry for entry in known}
    return [folded[entry] for entry in get_close_matches(name.casefold(), list(folded), count, nearness)]


def did_you_mean(name: str, known: Iterable[str], nearness: float = NEARNESS) -> str:
    """Return a suffix that suggests the closest known names, several if equally close; empty if none is."""
    near = near_names(name, known, _SHOWN, nearness)
    closest = [entry for entry in near if _similarity(name, entry) == _similarity(name, near[0])]
    return f", {question([repr(entry) for entry in sorted(closest)])}" if near else ""


def _similarity(name: str, known: str) -> float:
    return SequenceMatcher(None, known.casefold(), name.casefold()).ratio()


def question(proposals: Sequence[object], otherwise: str = "") -> str:
    """Return a question whether one of the proposals was meant, or `otherwise` if there are none."""
    return f"did you mean {' or '.join(map(str, proposals))}?" if proposals else otherwise


def near_files(wanted: Path | str, known: Iterable[Path] = ()) -> list[str]:
    """Return at most three existing files or folders that may have been meant.

    In this order: the same path with mistyped parts replaced by existing names; `known` files of the same
    name elsewhere; those with similar names.
    """
    wanted, known = Path(wanted), list(known)
    nearest = nearest_path(wanted)
    same = [path for path in known if path.name == wanted.name]
    names = _near_file_names(wanted.name, dict.fromkeys(path.name for path in known))
    alike = [path for name in names for path in known if path.name == name]
    found = {
        os.path.realpath(path): path for path in reversed([*([nearest] if nearest else []), *same, *alike])
    }
    return [path.as_posix() for path in reversed(found.values())][:_SHOWN]


def nearest_path(wanted: Path | str) -> Path | None:
    """Return the path with each part that does not exist replaced by the closest existing name.

    None if the path exists, a part has no close name, or too many parts would be replaced.
    """
    wanted = Path(os.path.expanduser(wanted))
    place, mistakes = Path(wanted.anchor), 0
    for part in wanted.relative_to(wanted.anchor).parts:
        if not os.path.lexists(place / part):
            near = _near_file_names(part, _names_in(place))
            mistakes += 1
            if not near or mistakes > _MISTAKES:
                return None
            part = near[0]
        place /= part
    return place if mistakes else None


def _near_file_names(name: str, known: Iterable[str]) -> list[str]:
    """Return the file names whose stem is close to that of `name`; their suffix must be close as well."""
    wanted, by_stem = Path(name), dict[str, str]()
    for entry in known:
        suffix = Path(entry).suffix
        if suffix == wanted.suffix or near_names(wanted.suffix[1:], [suffix[1:]], 1):
            by_stem.setdefault(Path(entry).stem, entry)
    return [by_stem[stem] for stem in near_names(wanted.stem, by_stem)]


def _names_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry, _ in zip(entries, range(_MANY), strict=False)]
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return []
    return sorted(name for name in names if not name.startswith("."))
