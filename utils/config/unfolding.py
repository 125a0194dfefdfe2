"""What a YAML file would become: refused before a few lines of it turn into gigabytes.

An alias costs a word and stands for all that it names, aliases within included ("billion laughs").
The values share their memory until something prints, copies or merges them.
"""

from __future__ import annotations

import yaml

MAX_VALUES = 200_000
MAX_DIGITS = 1000  # Python writes no whole number of more than 4300
# Of one that is a key: those of 61 bits and more can be chosen to have all the same hash, and a thousand
# of them then cost a million comparisons.
MAX_KEY_DIGITS = 15
MAX_DEPTH = 100  # the loader in C ends the process at some ten thousand
_OPENERS, _CLOSERS = "[{", "]}"


class UnfoldingError(ValueError):
    """Why a YAML file is not read, and the line from 1 where that shows."""

    def __init__(self, what: str, line: int) -> None:
        super().__init__(what, line)
        self.what, self.line = what, line


def check_depth(text: str) -> None:
    """Refuses a text that may nest deeper than `MAX_DEPTH`, before any loader sees it.

    Counts brackets wherever they stand, in text and remarks too, and the blanks and dashes that
    start a line: more than is really nested, never less.

    Raises:
        UnfoldingError: it may.
    """
    depth = 0
    for number, line in enumerate(text.splitlines(), 1):
        start = len(line) - len(line.lstrip(" -?:"))
        if start > MAX_DEPTH * 2:
            raise UnfoldingError("nested too deep", number)
        if depth == 0 and (line.lstrip().startswith("#") or not set(_OPENERS) & set(line)):
            continue
        for letter in line:
            depth += (letter in _OPENERS) - (letter in _CLOSERS and depth > 0)
            if depth > MAX_DEPTH:
                raise UnfoldingError("nested too deep", number)


def check_unfolding(root: yaml.Node) -> None:
    """Passes a composed YAML whose values, each alias counted in full, are at most `MAX_VALUES`.

    Raises:
        UnfoldingError: they are more, or a whole number has more than `MAX_DIGITS` digits, as a key
            more than `MAX_KEY_DIGITS`.
    """
    _count(root, {})


def _count(node: yaml.Node, known: dict[int, int], digits: int = MAX_DIGITS) -> int:
    """How many values a node stands for; one that holds itself counts once."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith(":int") and len(node.value) > digits:
            raise UnfoldingError(f"a number of {len(node.value)} digits", _line(node))
        return 1
    if id(node) not in known:
        known[id(node)] = 1
        total = 1
        for entry in node.value:
            if isinstance(entry, tuple):
                total += _count(entry[0], known, MAX_KEY_DIGITS) + _count(entry[1], known)
            else:
                total += _count(entry, known)
            if total > MAX_VALUES:
                raise UnfoldingError(f"its aliases unfold to more than {MAX_VALUES:,} values", _line(node))
        known[id(node)] = total
    return known[id(node)]


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
