"""Descriptions of the options for the user: `--help` and the tables of the README."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.config.options_base import GROUPS, Options
from utils.config.settings import Setting, settings_of

FLAGS_WIDTH = 28  # width of the column of names in --help
_WORDS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
_ALWAYS = (
    ("-h, --help", "show this text"),
    ("--version", "show the version"),
    ("--debug", "show where in the code an error arose"),
)


def help_text(options_class: type[Options], script: str, description: str) -> str:
    """Return the text of `--help`, as wide as the terminal (at most 110 columns)."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    loose = [setting.name for setting in settings_of(options_class).values() if setting.positional]
    words = "".join(f" [{name} ...]" for name in loose)
    parts = [f"usage: python {script}{words} [--option value ...]", textwrap.fill(description, width)]
    for group, settings in _grouped(options_class):
        rows = [(_signature(setting), _explanation(setting)) for setting in settings]
        parts.append("\n".join([group, *_columns(rows, width)]))
    parts.append("\n".join(["Other", *_columns(_ALWAYS, width)]))
    parts.append("Names may be written with dashes or underscores.")
    return "\n\n".join(parts)


def option_table(options_class: type[Options], beyond: type[Options] | None = None) -> str:
    """Return the options as Markdown tables, one per group, without those that `beyond` also has."""
    known = settings_of(beyond) if beyond else {}
    parts = []
    for group, settings in _grouped(options_class):
        rows = [_table_row(setting) for setting in settings if setting.name not in known]
        if rows:
            parts.append("\n".join([f"| {group} | Default | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def names_of(setting: Setting) -> list[str]:
    """Return all names of an option on the command line, the main one first."""
    return [setting.flag, *(f"--{alias}" for alias in setting.aliases)]


def opposites_of(setting: Setting) -> list[str]:
    """Return the names that turn off a switch that is on by default; none for other options."""
    if not setting.switch or setting.default is False:
        return []
    return [f"--no-{name.removeprefix('--')}" for name in names_of(setting)]


def _grouped(options_class: type[Options]) -> Iterator[tuple[str, list[Setting]]]:
    settings = settings_of(options_class).values()
    for group in GROUPS:
        members = [setting for setting in settings if setting.group == group]
        if members:
            yield group, members


def _value_word(setting: Setting) -> str:
    """Return the placeholder for the value: N, {SGD,Adam}, N ..., [TEXT]; empty for a switch."""
    if setting.switch:
        return ""
    word = f"{{{','.join(setting.choices)}}}" if setting.choices else _WORDS[setting.kind]
    word = "|".join((word, *setting.words))
    if setting.many:
        return f"{word} ..."
    return word if setting.bare is None else f"[{word}]"


def _signature(setting: Setting) -> str:
    word = _value_word(setting)
    if setting.positional:
        return f"{setting.name} ..., {setting.flag} {word}"
    return ", ".join(names_of(setting) + opposites_of(setting)) + (f" {word}" if word else "")


def _explanation(setting: Setting) -> str:
    """Return the help text with unit, range and default."""
    facts = [fact for fact in (setting.unit, str(setting.limits)) if fact]
    if shown := written_default(setting):
        facts.append(f"default {shown}")
    return f"{setting.help} ({', '.join(facts)})" if facts else setting.help


def written_default(setting: Setting) -> str:
    """Return the default as it would be typed; empty if the option is off or empty by default."""
    if setting.switch:
        return "on" if setting.default else ""
    if setting.default in (None, "", ()):
        return ""
    return _written(setting.default)


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(_written(entry) for entry in value)
    if isinstance(value, float):
        return f"{value:g}"
    return value.as_posix() if isinstance(value, Path) else str(value)


def _columns(rows: Sequence[tuple[str, str]], width: int) -> Iterator[str]:
    """Yield lines with names on the left and text on the right; long names get a line of their own."""
    for left, text in rows:
        lines = textwrap.wrap(text, max(width - FLAGS_WIDTH - 2, 30), break_on_hyphens=False)
        if len(left) > FLAGS_WIDTH - 2:
            yield f"  {left}"
        else:
            yield f"  {left:<{FLAGS_WIDTH}}{lines.pop(0)}"
        yield from (" " * (FLAGS_WIDTH + 2) + line for line in lines)


def _table_row(setting: Setting) -> str:
    names = f"`{setting.name} ...`, " if setting.positional else ""
    names += ", ".join(f"`{name}`" for name in names_of(setting) + opposites_of(setting))
    shown = written_default(setting)
    facts = [fact for fact in (setting.unit, str(setting.limits), *_choices(setting)) if fact]
    text = f"{setting.help} ({', '.join(facts)})" if facts else setting.help
    return f"| {names} | {f'`{shown}`' if shown else ''} | {text} |"


def _choices(setting: Setting) -> list[str]:
    return [" or ".join(f"`{choice}`" for choice in setting.choices)] if setting.choices else []
