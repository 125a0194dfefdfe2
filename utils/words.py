"""Wording of counts and lists in messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence


def counted(number: int, noun: str, nouns: str = "") -> str:
    """Return a count with its noun, as in "1 image", "1200 images"; `nouns` is an irregular plural."""
    return f"{number} {noun if number == 1 else nouns or _plural(noun)}"


def _plural(noun: str) -> str:
    hisses = noun.endswith(("s", "x", "z", "ch", "sh")) and not noun.endswith("och")  # epochs
    return noun + ("es" if hisses else "s")


def are(number: int) -> str:
    """Return the verb after a count: is or are."""
    return "is" if number == 1 else "are"


def were(number: int) -> str:
    """Return the verb after a count: was or were."""
    return "was" if number == 1 else "were"


def found_in_words(labels: Sequence[int], names: Sequence[str] | Mapping[int, str]) -> str:
    """Count the objects per class, as in "2 persons, 1 dog"; empty for none. labels: class indices."""
    return ", ".join(counted(count, names[label]) for label, count in sorted(Counter(labels).items()))


def first_of(entries: Sequence[str], most: int) -> str:
    """Join the first entries of a list, with an ellipsis if there are more."""
    return "; ".join(entries[:most]) + (" ..." if len(entries) > most else "")


def listed(names: Sequence[str], most: int = 6) -> str:
    """Return the number of classes and the names of the first, as in "2 classes (dog, cat)"."""
    return f"{counted(len(names), 'class')} ({first_names(names, most)})"


def first_names(names: Sequence[str], most: int = 6) -> str:
    """Join the first of several names, as in "dog, cat, ..."."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
