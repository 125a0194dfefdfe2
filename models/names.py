"""Which class of one network is which of another, by their names."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from utils.words import listed

MOST_UNKNOWN = 40  # names of classes without a class term that are told
# VOC's words for what COCO calls otherwise, as `plain` spells both.
_COCO_WORDS = {"aeroplane": "airplane", "motorbike": "motorcycle", "sofa": "couch", "tvmonitor": "tv"}


def partners(own: Sequence[str], wanted: Sequence[str]) -> list[int | None]:
    """For each wanted name the number of its partner among the own, each of which has one at the most.

    A name that is spelled the same goes before one that is only alike, and that before another word.
    """
    found: list[int | None] = [None] * len(wanted)
    taken: set[int] = set()
    for alike in (str, plain, _word):
        free: dict[str, list[int]] = {}
        for number in range(len(own) - 1, -1, -1):  # the first of equal names is the last of its list
            if number not in taken:
                free.setdefault(alike(own[number]), []).append(number)
        for mine, name in enumerate(wanted):
            others = free.get(alike(name)) if found[mine] is None else None
            if others:
                partner = found[mine] = others.pop()
                taken.add(partner)
    return found


def plain(name: str) -> str:
    """A class name without what people spell differently."""
    return re.sub(r"[\s_-]+", "", name.casefold())


def _word(name: str) -> str:
    """COCO's word for a class name."""
    return _COCO_WORDS.get(plain(name), plain(name))


@dataclass(frozen=True)
class ClassMap:
    """Classes that both sides know, by their names; dashes and capitals do not count.

    Where VOC and COCO have different words for a thing (aeroplane, airplane), these are one name.

    student, teacher: (C,) their numbers on each side. unknown: of the data, that the teacher lacks.
    ignored: of the teacher, that the data lacks. one: what the data's classes are called where all of them
    are one; `student` then is that one, `teacher` all that belong to it.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    unknown: tuple[str, ...]
    ignored: tuple[str, ...]
    one: str = ""

    @classmethod
    def by_name(
        cls, own: Sequence[str], wanted: Sequence[str], only: Collection[int] | None = None
    ) -> ClassMap:
        """From the teacher's classes `own` and those of the data; `only` numbers of the latter count."""
        numbers = partners(own, wanted)
        if only is not None:
            numbers = [number if mine in only else None for mine, number in enumerate(numbers)]
        pairs = [(mine, theirs) for mine, theirs in enumerate(numbers) if theirs is not None]
        known = {theirs for _, theirs in pairs}
        return cls(
            tuple(mine for mine, _ in pairs),
            tuple(theirs for _, theirs in pairs),
            tuple(name for name, number in zip(wanted, numbers, strict=True) if number is None),
            tuple(name for number, name in enumerate(own) if number not in known),
        )

    @classmethod
    def all_as_one(
        cls, own: Sequence[str], merged: Sequence[str], name: str, only: Collection[int] | None = None
    ) -> ClassMap:
        """From the teacher's classes `own` to the single class `name`, which the data's `merged` are.

        `only` numbers of the merged ones count.
        """
        parts = cls.by_name(own, merged, only)
        if not parts.teacher:
            return cls((), (), (name,), tuple(own))
        return cls((0,), parts.teacher, parts.unknown, parts.ignored, name)

    def known(self, wanted: Sequence[str]) -> set[int]:
        """Which of the data's classes, merged or not, the teacher knows."""
        if not self.one:
            return set(self.student)
        return {number for number, name in enumerate(wanted) if name not in self.unknown}

    def pairs(self, own: Sequence[str], wanted: Sequence[str]) -> str:
        """Which of the data's classes is which of the teacher's, in words."""
        if self.one:
            return f"{listed([own[theirs] for theirs in self.teacher])} as one, '{self.one}'"
        names = [(wanted[mine], own[theirs]) for mine, theirs in zip(self.student, self.teacher, strict=True)]
        same, others = [a for a, b in names if a == b], [f"{a} = {b}" for a, b in names if a != b]
        # Every guess is shown: a wrong one would teach a wrong class.
        return ", ".join(([listed(same)] if same else []) + others)

    @property
    def is_identity(self) -> bool:
        """Whether both sides know the same classes in the same order."""
        return not self.unknown and not self.ignored and self.student == self.teacher

    def __str__(self) -> str:
        """One line."""
        known = len(self.teacher)
        parts = [f"{known} of {known + len(self.unknown)} classes known to the teacher"]
        if self.unknown:
            what = "unknown" if self.one else "no class term for"
            parts.append(f"{what} {listed(self.unknown, MOST_UNKNOWN)}")
        if self.ignored:
            parts.append(f"{listed(self.ignored)} of the teacher's ignored")
        return "; ".join(parts)
