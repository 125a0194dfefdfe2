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
    free = dict(enumerate(own))
    found: list[int | None] = [None] * len(wanted)
    for alike in (str, plain, _word):
        for mine, name in enumerate(wanted):
            if found[mine] is None:
                partner = next((n for n, other in free.items() if alike(other) == alike(name)), None)
                found[mine] = partner
                free = {n: other for n, other in free.items() if n != partner}
    return found


def plain(name: str) -> str:
    """A class name without what people spell differently."""
    return re.sub(r"[\s_-]+", "", name.casefold())


def _word(name: str) -> str:
    """COCO's word for a class name."""
    return _COCO_WORDS.get(plain(name), plain(name))
