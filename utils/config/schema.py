"""Loading of YAML files as plain data or typed settings, with line numbers for messages."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from utils.config.expansion import ExpansionError, check_expansion, check_size
from utils.config.files import read_regular
from utils.config.settings import SettingsError, read_plain
from utils.errors import UsageError, UserError

MAX_BYTES = 4 * 2**20
Settings = TypeVar("Settings")
_LINES_DEPTH = 3
_MERGE = "<<"  # YAML's merge key, which may appear several times


def load_yaml(path: Path, loader: Any = yaml.SafeLoader) -> tuple[dict[str, Any], dict[str, int]]:
    """Load the mapping in a YAML file, and the 1-based line number of each of its keys.

    Nested keys are given by their path, as in `download.0.url`.

    Only plain values are accepted: tags for Python objects are errors, and so are duplicate keys, of which
    YAML parsers silently keep the last. loader: one of PyYAML's safe ones.

    Raises:
        UserError: if the file is unreadable or invalid; names it and, if known, the line.
    """
    node, data = parse_yaml(read_text(path), path, loader)
    doubles = list(_doubles(node)) if node else []
    if doubles:
        raise UserError("; ".join(doubles), path, "keep one of them")
    if not isinstance(node, yaml.MappingNode) or not isinstance(data, dict):
        raise UserError("needs 'key: value' lines", path, "see the YAML files in data/ for the form")
    lines = dict(_lines(node, _LINES_DEPTH))
    return {str(key): value for key, value in data.items()}, lines


def settings_from(owner: type[Settings], data: dict[str, Any], lines: dict[str, int], path: Path) -> Settings:
    """Create a settings dataclass from the result of `load_yaml`; missing keys get their defaults.

    Raises:
        UsageError: if keys are unknown or values invalid; names each with its line.
    """
    values, problems = read_plain(owner, data)
    try:
        settings = owner(**values)
    except SettingsError as error:
        problems += error.problems
    if problems:
        problems.sort(key=lambda problem: lines.get(problem[0], 0))
        listed = (f"line {lines[key]}: {what}" if key in lines else what for key, what in problems)
        raise UsageError("; ".join(listed), path)
    return settings


def _lines(node: yaml.Node, depth: int, place: str = "") -> Iterator[tuple[str, int]]:
    """Yield the path and line of each key and list entry down to a depth."""
    if isinstance(node, yaml.MappingNode):
        inside = [(str(key.value), key.start_mark, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        inside = [(str(number), value.start_mark, value) for number, value in enumerate(node.value)]
    else:
        return
    for name, mark, value in inside:
        yield f"{place}{name}", mark.line + 1
        if depth > 1:
            yield from _lines(value, depth - 1, f"{place}{name}.")


def yaml_text(data: dict[str, Any]) -> str:
    """Dump plain data as YAML, keeping its order, with one line per key."""
    # None puts nested lists on one line, but also a whole mapping that contains none.
    flow = None if any(isinstance(value, list | dict) for value in data.values()) else False
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=flow, width=110))


def parse_yaml(text: str, path: Path, loader: Any) -> tuple[yaml.Node | None, Any]:
    """Parse YAML to its node graph, with aliases and merges as written, and to plain values.

    loader: one of PyYAML's safe ones.

    Raises:
        UserError: if it is not valid YAML, nests too deep, or has too many values, also by its aliases.
    """
    try:
        check_size(text)
        node = yaml.compose(text, loader)
        if node is not None:
            check_expansion(node)
        return node, yaml.load(text, loader)
    except ExpansionError as error:
        raise _invalid(path, error.line, error.what) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _invalid(path, mark.line + 1 if mark else None, error.problem or str(error)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _invalid(path, line, f"character {error.character:#04x}") from error
    except RecursionError as error:
        raise _invalid(path, None, "nested too deep") from error
    # The latter two: a date or number that Python cannot hold.
    except (yaml.YAMLError, ValueError, ArithmeticError) as error:
        raise _invalid(path, None, str(error)) from error


def read_text(path: Path) -> str:
    """Read the text of a settings file.

    Raises:
        UserError: if it cannot be read, is too long, or is not UTF-8.
    """
    try:
        content = read_regular(path, MAX_BYTES)
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        if error.errno == errno.EFBIG:
            what = f"has more than {MAX_BYTES // 2**20} MiB, too much for a settings file"
        raise UserError(what, path, "check the path") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError("is not text in UTF-8", f"{path}, line {line}", "save it as UTF-8") from error


def _invalid(path: Path, line: int | None, what: str) -> UserError:
    return UserError(f"is not valid YAML ({what})", f"{path}, line {line}" if line else path, "correct it")


def _doubles(root: yaml.Node) -> Iterator[str]:
    """Yield a message for each key that is repeated in a mapping."""
    seen_nodes: set[int] = set()  # an alias may refer to a node that contains it
    pending = [root]
    while pending:
        node = pending.pop()
        if id(node) in seen_nodes or isinstance(node, yaml.ScalarNode):
            continue
        seen_nodes.add(id(node))
        if not isinstance(node, yaml.MappingNode):
            pending.extend(node.value)
            continue
        first: dict[tuple[str, str], tuple[int, yaml.Node]] = {}
        for key, value in node.value:
            pending.extend((key, value))
            if not isinstance(key, yaml.ScalarNode) or key.value == _MERGE:
                continue
            line = key.start_mark.line + 1
            earlier = first.setdefault((key.tag, key.value), (line, key))
            if earlier[1] is not key:
                yield f"lines {earlier[0]} and {line}: '{key.value}' is given twice"
