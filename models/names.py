"""Matching of the classes of two networks by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from utils.words import listed

MOST_UNKNOWN = 40  # names printed of the classes without a class term
# VOC names and their COCO synonyms, spelled as `plain` returns them.
_COCO_WORDS = {"aeroplane": "airplane", "motorbike": "motorcycle", "sofa": "couch", "tvmonitor": "tv"}


def partners(own: Sequence[str], wanted: Sequence[str]) -> list[int | None]:
    """Return for each wanted name the index of its match in `own`, or None; matches are one-to-one.

    Identical spelling goes first, then equality ignoring case and separators, then VOC/COCO synonyms.
    """
    found: list[int | None] = [None] * len(wanted)
    taken: set[int] = set()
    for alike in (str, plain, _word):
        free: dict[str, list[int]] = {}
        for number in range(len(own) - 1, -1, -1):  # reversed, so that pop() returns the first of equal names
            if number not in taken:
                free.setdefault(alike(own[number]), []).append(number)
        for mine, name in enumerate(wanted):
            others = free.get(alike(name)) if found[mine] is None else None
            if others:
                partner = found[mine] = others.pop()
                taken.add(partner)
    return found


def plain(name: str) -> str:
    """Return a class name in lower case, without spaces, hyphens and underscores."""
    return re.sub(r"[\s_-]+", "", name.casefold())


def _word(name: str) -> str:
    """Return COCO's synonym for a class name, in plain spelling."""
    return _COCO_WORDS.get(plain(name), plain(name))


@dataclass(frozen=True)
class ClassMap:
    """The classes that teacher and data share by name, ignoring case and separators.

    VOC and COCO names of the same class (aeroplane, airplane) match too.

    student, teacher: (C,) class indices on each side. unknown: classes of the data that the teacher lacks.
    ignored: classes of the teacher that the data lacks. one: the name of the single class if all of the
    data's classes are merged; then `student` is that class and `teacher` all that belong to it.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    unknown: tuple[str, ...]
    ignored: tuple[str, ...]
    one: str = ""

    @classmethod
    def by_name(cls, own: Sequence[str], wanted: Sequence[str]) -> ClassMap:
        """Match the teacher's classes `own` with the data's."""
        numbers = partners(own, wanted)
        pairs = [(mine, theirs) for mine, theirs in enumerate(numbers) if theirs is not None]
        known = {theirs for _, theirs in pairs}
        return cls(
            tuple(mine for mine, _ in pairs),
            tuple(theirs for _, theirs in pairs),
            tuple(name for name, number in zip(wanted, numbers, strict=True) if number is None),
            tuple(name for number, name in enumerate(own) if number not in known),
        )

    @classmethod
    def all_as_one(cls, own: Sequence[str], merged: Sequence[str], name: str) -> ClassMap:
        """Map the teacher's classes `own` to the single class `name`, into which the data's are `merged`."""
        parts = cls.by_name(own, merged)
        if not parts.teacher:
            return cls((), (), (name,), tuple(own))
        return cls((0,), parts.teacher, parts.unknown, parts.ignored, name)

    def known(self, wanted: Sequence[str]) -> set[int]:
        """Return the indices of the data's classes, merged or not, that the teacher knows."""
        if not self.one:
            return set(self.student)
        return {number for number, name in enumerate(wanted) if name not in self.unknown}

    def pairs(self, own: Sequence[str], wanted: Sequence[str]) -> str:
        """Describe in words which class of the data corresponds to which of the teacher's."""
        if self.one:
            return f"{listed([own[theirs] for theirs in self.teacher])} as one, '{self.one}'"
        names = [(wanted[mine], own[theirs]) for mine, theirs in zip(self.student, self.teacher, strict=True)]
        same, others = [a for a, b in names if a == b], [f"{a} = {b}" for a, b in names if a != b]
        # All inexact matches are shown: a wrong one would teach a wrong class.
        return ", ".join(([listed(same)] if same else []) + others)

    @property
    def is_identity(self) -> bool:
        """Whether both sides know the same classes in the same order."""
        return not self.unknown and not self.ignored and self.student == self.teacher

    def __str__(self) -> str:
        """Return a one-line summary."""
        known = len(self.teacher)
        parts = [f"{known} of {known + len(self.unknown)} classes known to the teacher"]
        if self.unknown:
            what = "unknown" if self.one else "no class term for"
            parts.append(f"{what} {listed(self.unknown, MOST_UNKNOWN)}")
        if self.ignored:
            parts.append(f"the teacher's other {listed(self.ignored)} ignored")
        return "; ".join(parts)
