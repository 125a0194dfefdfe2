"""Typed settings: the values that a dataclass field accepts, from its annotation and its `option(...)`.

Command line, YAML files and direct construction all validate with the same `Setting`, so a range is
declared once and all messages about it are the same.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from utils.config.suggestions import did_you_mean
from utils.errors import UsageError

_KEY = "option"
_HUGE = 1e300  # beyond any setting; larger integers may overflow a float
_WHOLE = re.compile(r"[+-]?[0-9]+")
_NOUNS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}


class SettingsError(UsageError):
    """Invalid settings; `problems` has (key, what) pairs."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(what for _, what in problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class Limits:
    """The numbers from `low` to `high`; with `open_low`, `low` itself is excluded."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.open_low else number >= self.low
        return above and number <= self.high and abs(number) < math.inf  # False for NaN

    def __str__(self) -> str:
        if self.low == -math.inf:
            return "" if self.high == math.inf else f"up to {self.high:g}"
        low = f"above {self.low:g}" if self.open_low else f"{self.low:g} or more"
        if self.high == math.inf:
            return low
        return f"{low}, up to {self.high:g}" if self.open_low else f"{self.low:g} to {self.high:.10g}"


def at_least(low: float) -> Limits:
    """The range from `low`, included."""
    return Limits(low)


def above(low: float) -> Limits:
    """The range above `low`, which is excluded."""
    return Limits(low, open_low=True)


def between(low: float, high: float) -> Limits:
    """The range from `low` to `high`, both included."""
    return Limits(low, high)


@dataclass(frozen=True, kw_only=True)
class _Declaration:
    """The declaration of a field, apart from its annotation and default."""

    help: str
    aliases: tuple[str, ...]
    limits: Limits
    unit: str
    group: str
    bare: Any
    positional: bool


def option(  # noqa: PLR0913 - one parameter per property
    default: Any,
    help: str,
    *,
    aliases: Sequence[str] = (),
    limits: Limits = Limits(),  # noqa: B008 - frozen
    unit: str = "",
    group: str = "",
    bare: Any = None,
    positional: bool = False,
) -> Any:
    """Declare a dataclass field that is a setting.

    help: what it does, as a continuation of its name. aliases: other names on the command line,
    without dashes. unit: of a number. bare: the value if the option is given without one; None if it
    needs one. positional: takes the words that belong to no other option; for at most one option of a
    script, with several values.
    """
    declared = _Declaration(
        help=help,
        aliases=tuple(aliases),
        limits=limits,
        unit=unit,
        group=group,
        bare=bare,
        positional=positional,
    )
    return field(default=default, metadata={_KEY: declared})


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The setting declared by a field.

    kind: type of a single value. choices: the allowed values, any if empty. words: texts that are allowed
    besides numbers. many: whether it takes a tuple of values.
    optional: whether None is allowed. The rest as in `option`.
    """

    name: str
    kind: type
    choices: tuple[str, ...]
    words: tuple[str, ...]
    many: bool
    optional: bool
    default: Any
    help: str
    aliases: tuple[str, ...]
    limits: Limits
    unit: str
    group: str
    bare: Any
    positional: bool

    @property
    def flag(self) -> str:
        """The option's name on the command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def switch(self) -> bool:
        """Whether it is a boolean, which takes no value on the command line."""
        return self.kind is bool

    @property
    def expected(self) -> str:
        """A description of the allowed values."""
        if self.choices:
            return f"one of {', '.join(self.choices)}" if len(self.choices) > 1 else self.choices[0]
        return " or ".join((self._expected_kind, *self.words))

    @property
    def _expected_kind(self) -> str:
        allowed = str(self.limits)
        if not allowed:
            return _NOUNS[self.kind]
        if self.limits.open_low:
            return f"{_NOUNS[self.kind]} {allowed}"
        return f"{_NOUNS[self.kind]}{' of' if self.limits.high == math.inf else ' from'} {allowed}"

    def from_words(self, words: Sequence[str]) -> Any:
        """Convert words of the command line to a value.

        Raises:
            ValueError: if they are invalid; says what is expected.
        """
        if self.many:
            return tuple(self._from_word(word) for word in words)
        (word,) = words
        return self._from_word(word)

    def from_plain(self, value: Any) -> Any:
        """Convert a value from a YAML file.

        Raises:
            ValueError: if it is invalid; says what is expected.
        """
        if value is None and self.optional:
            return None
        if self.many:
            entries = value if isinstance(value, list | tuple) else [value]
            return tuple(self._from_plain(entry) for entry in entries)
        return self._from_plain(value)

    def check(self, value: Any) -> None:
        """Check the range of a value of the right type.

        Raises:
            ValueError: if it is out of range; says what is expected.
        """
        for entry in value if self.many else (value,):
            self._checked(entry)

    def _from_word(self, word: str) -> Any:
        if word in self.words:
            return word
        if self.kind is int:
            return self._checked(int(word) if _WHOLE.fullmatch(word) else math.nan)
        if self.kind is float:
            return self._checked(_number(word), did_you_mean(word, self.words))
        if self.kind is Path:
            if not word and self.optional:
                return None
            return self._checked(Path(word)) if word else self._refuse("must not be empty")
        return self._checked(word)

    def _from_plain(self, value: Any) -> Any:
        if value in self.words:
            return value
        if self.kind in (int, float):
            # PyYAML parses 1e-3 as text; only 1.0e-3 is a number.
            number = _number(value) if isinstance(value, str) else value
            if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < _HUGE:
                return self._refuse()
            if self.kind is int and number != int(number):
                return self._refuse()
            return self._checked(self.kind(number))
        if self.kind is Path and isinstance(value, str):
            return self._from_word(value)
        return self._checked(value) if isinstance(value, self.kind) else self._refuse()

    def _checked(self, value: Any, hint: str = "") -> Any:
        if (value is None and self.optional) or value in self.words:
            return value
        if self.kind in (int, float) and value not in self.limits:
            self._refuse(f"must be {self.expected}{hint}")
        if self.choices and value not in self.choices:
            self._refuse(f"must be {self.expected}{did_you_mean(str(value), self.choices)}")
        return value

    def _refuse(self, message: str = "") -> NoReturn:
        raise ValueError(message or f"must be {self.expected}")


def settings_of(owner: type) -> Mapping[str, Setting]:
    """Return the settings of a dataclass by field name, in the order of the fields."""
    if owner not in _read:
        _read[owner] = types.MappingProxyType(dict(_settings(owner)))
    return _read[owner]


_read: dict[type, Mapping[str, Setting]] = {}  # cached: evaluating annotations takes a millisecond


def _settings(owner: type) -> Iterator[tuple[str, Setting]]:
    hints = get_type_hints(owner)
    for entry in fields(owner):
        if _KEY in entry.metadata:
            assert entry.default is not MISSING
            kind, choices, many, optional = _read_annotation(hints[entry.name])
            yield (
                entry.name,
                Setting(
                    name=entry.name,
                    kind=kind,
                    choices=choices,
                    words=_words_beside_numbers(hints[entry.name]),
                    many=many,
                    optional=optional,
                    default=entry.default,
                    **vars(entry.metadata[_KEY]),
                ),
            )


def read_plain(owner: type, data: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Convert plain data to values for a dataclass; also returns all problems as (key, what) pairs."""
    settings = settings_of(owner)
    values, problems = {}, []
    for key, value in data.items():
        if key not in settings:
            problems.append((key, f"unknown key '{key}'{did_you_mean(key, settings)}"))
            continue
        try:
            values[key] = settings[key].from_plain(value)
        except ValueError as error:
            problems.append((key, f"{key}: {value!r} {error}"))
    return values, problems


def out_of_range(settings: Any) -> Iterator[tuple[Setting, Any, str]]:
    """Yield each value of a dataclass that is out of range as (setting, value, what is expected)."""
    for name, setting in settings_of(type(settings)).items():
        value = getattr(settings, name)
        try:
            setting.check(value)
        except ValueError as error:
            yield setting, value, str(error)


def to_plain(settings: Any) -> dict[str, Any]:
    """Return the values of a dataclass as plain data: numbers, text, lists and None."""
    values = {name: getattr(settings, name) for name in settings_of(type(settings))}
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _number(text: str) -> float:
    """Parse a number; returns NaN, which no range contains, if the text is not one."""
    try:
        return float(text) if "_" not in text else math.nan
    except ValueError:
        return math.nan


def _words_beside_numbers(hint: Any) -> tuple[str, ...]:
    """Return ("auto",) for `float | Literal["auto"]`; () for annotations without such literals."""
    if get_origin(hint) not in (Union, types.UnionType) or not {int, float} & set(get_args(hint)):
        return ()
    return tuple(word for entry in get_args(hint) if get_origin(entry) is Literal for word in get_args(entry))


def _read_annotation(hint: Any) -> tuple[type, tuple[str, ...], bool, bool]:
    """Return (kind, choices, many, optional) for an annotation."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        if _words_beside_numbers(hint):
            inner = [argument for argument in inner if get_origin(argument) is not Literal]
        kind, choices, many, _ = _read_annotation(*inner)
        return kind, choices, many, type(None) in arguments
    if origin is Literal:
        return str, arguments, False, False
    if origin is tuple:
        assert arguments[1:] == (Ellipsis,), hint
        kind, choices, _, _ = _read_annotation(arguments[0])
        return kind, choices, True, False
    assert hint in _NOUNS, f"no setting can be a {hint}"
    return hint, (), False, False
