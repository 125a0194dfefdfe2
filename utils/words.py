"""Small pieces of sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence


def counted(number: int, noun: str, nouns: str = "") -> str:
    """A number of things: 1 picture, 1200 pictures; `nouns` where an s does not make the plural."""
    return f"{number} {noun if number == 1 else nouns or noun + 's'}"


def found_in_words(labels: Sequence[int], names: Sequence[str] | Mapping[int, str]) -> str:
    """How many objects of each class, as in "2 persons, 1 dog"; empty without any. labels: their classes."""
    return ", ".join(counted(count, names[label]) for label, count in sorted(Counter(labels).items()))


def first_of(entries: Sequence[str], most: int) -> str:
    """The first sentences of a list, and whether there are more."""
    return "; ".join(entries[:most]) + (" ..." if len(entries) > most else "")


def listed(names: Sequence[str], most: int = 6) -> str:
    """How many classes there are, and the names of the first."""
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"{counted(len(names), 'class', 'classes')} ({shown})"
