"""Which class of one network is which of another, by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence

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
