"""Limits on the expanded size of a YAML file, so that a few lines cannot turn into gigabytes.

An alias takes one word and stands for everything it refers to, including nested aliases ("billion
laughs"). The values share memory until something prints, copies or merges them.
"""

from __future__ import annotations

from contextlib import suppress

import yaml

MAX_VALUES = 200_000
MAX_DIGITS = 1000  # Python does not print integers of more than 4300
# For keys: integers of 61 bits and more can be chosen to have the same hash, and a thousand of them would
# then cost a million comparisons.
MAX_KEY_DIGITS = 15
MAX_DEPTH = 100  # the C loader crashes the process at some ten thousand
_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class ExpansionError(ValueError):
    """A YAML file that exceeds a limit: why, and the 1-based line number."""

    def __init__(self, what: str, line: int) -> None:
        super().__init__(what, line)
        self.what, self.line = what, line


def check_size(text: str) -> None:
    """Reject a YAML text of more than `MAX_VALUES` values, or nested deeper than `MAX_DEPTH`.

    A loader takes a kilobyte and up to 0.1 ms for each value, and recurses into nested ones.

    What is not valid YAML passes up to its first error, where the loader will stop too.

    Raises:
        ExpansionError: if it has more or nests deeper.
    """
    depth = count = 0
    with suppress(yaml.YAMLError):
        for event in yaml.parse(text, _PARSER):  # does not recurse, and stops here at the limit
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            count += isinstance(event, yaml.NodeEvent)
            if depth > MAX_DEPTH or count > MAX_VALUES:
                mark = event.start_mark
                what = "nested too deep" if depth > MAX_DEPTH else f"more than {MAX_VALUES:,} values"
                raise ExpansionError(what, mark.line + 1 if mark else 1)


def check_expansion(root: yaml.Node) -> None:
    """Check that a composed YAML has at most `MAX_VALUES` values, with each alias counted in full.

    Raises:
        ExpansionError: if there are more, or one contains itself, or an integer has more than `MAX_DIGITS`
            digits, or as a key more than `MAX_KEY_DIGITS`.
    """
    _count(root, {})


def _count(node: yaml.Node, known: dict[int, int], digits: int = MAX_DIGITS) -> int:
    """Count the values that a node expands to."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith(":int") and len(node.value) > digits:
            raise ExpansionError(f"a number of {len(node.value)} digits", _line(node))
        return 1
    if id(node) not in known:
        known[id(node)] = 0  # until it is counted
        total = 1
        for entry in node.value:
            if isinstance(entry, tuple):
                total += _count(entry[0], known, MAX_KEY_DIGITS) + _count(entry[1], known)
            else:
                total += _count(entry, known)
            if total > MAX_VALUES:
                raise ExpansionError(f"its aliases unfold to more than {MAX_VALUES:,} values", _line(node))
        known[id(node)] = total
    if not known[id(node)]:
        raise ExpansionError("a value contains itself", _line(node))
    return known[id(node)]


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
