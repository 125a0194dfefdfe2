"""Escaping of text from files for output on a terminal."""

from __future__ import annotations

import unicodedata


def printable(text: str, keep: str = "") -> str:
    """Escape the characters that a terminal might interpret or hide, except those in `keep`.

    These are control and formatting characters (escape sequences, line breaks, changes of the writing
    direction), lone surrogates and unassigned code points.
    """
    if text.isprintable():  # as nearly all text, a thousand times as fast
        return text
    return "".join(c if _is_harmless(c) or c in keep else _written_out(c) for c in text)


def _is_harmless(letter: str) -> bool:
    return letter.isprintable() or unicodedata.category(letter) == "Zs"


def _written_out(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
