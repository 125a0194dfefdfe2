"""Text from files on its way to a terminal."""

from __future__ import annotations

import unicodedata


def printable(text: str, keep: str = "") -> str:
    """The text with everything written out that a terminal might obey or hide; `keep` stays.

    Control and formatting characters (escape sequences, line breaks, changes of the writing
    direction), lone surrogates and what no font has a picture for.
    """
    return "".join(c if _is_harmless(c) or c in keep else _written_out(c) for c in text)


def _is_harmless(letter: str) -> bool:
    return letter.isprintable() or unicodedata.category(letter) == "Zs"


def _written_out(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
