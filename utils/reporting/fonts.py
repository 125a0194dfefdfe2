"""Fonts for names that are drawn: DejaVu Sans, or an installed one for letters that it lacks."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

ASCII = frozenset(range(32, 127))
# Files of widespread fonts that have other letters beside ASCII, in lower case without suffix. The first
# that fits is used, so that the same machine always draws the same.
_KNOWN = (
    *("notosanscjk-regular", "notosanscjksc-regular", "notosanscjkjp-regular", "notosanscjkkr-regular"),
    *("notosanssc-regular", "notosansjp-regular", "notosanskr-regular", "sourcehansanssc-regular"),
    *("sourcehansanscn-regular", "wqy-microhei", "wqy-zenhei", "droidsansfallbackfull", "droidsansfallback"),
    *("pingfang", "hiragino sans gb", "stheiti medium", "applesdgothicneo", "msyh", "simhei", "msgothic"),
    *("yugothr", "malgun", "nanumgothic", "freesans", "loma", "leelawui", "nirmala", "arial unicode"),
    *("arialuni", "unifont"),
)


def default_font() -> str:
    """Return DejaVu Sans as shipped with matplotlib: the same on every machine, without a download."""
    from matplotlib import get_data_path

    return str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def font_for(text: str) -> str | None:
    """Return the font to draw a line of text with, None if none has all of its letters.

    Installed fonts are looked for only if DejaVu Sans lacks some.
    """
    letters = frozenset(map(ord, text))
    return default_font() if letters <= letters_of_default() else _installed_font(letters)


@lru_cache(maxsize=1)
def letters_of_default() -> frozenset[int]:
    """Return the letters of DejaVu Sans."""
    return _letters_of(default_font())


@lru_cache(maxsize=1024)
def _installed_font(letters: frozenset[int]) -> str | None:
    # Numbers and confidences follow a name.
    return next((path for path in _installed() if letters | ASCII <= _letters_of(path)), None)


@lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    """Return the installed fonts among the known ones, the preferred first."""
    from matplotlib.font_manager import findSystemFonts

    # Not from matplotlib's list, which it keeps on disk: fonts installed since are missing there.
    places = {Path(path).stem.lower(): path for path in sorted(findSystemFonts(), reverse=True)}
    return tuple(places[stem] for stem in _KNOWN if stem in places)


@lru_cache(maxsize=8)
def _letters_of(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(letter for letter in FT2Font(path).get_charmap() if letter >= 32)
    except (OSError, RuntimeError):  # a damaged file, or letters as bitmaps
        return frozenset()
