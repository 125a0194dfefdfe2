"""Command line parsing into an options object, and mapping of errors to exit codes.

argparse is not used: it stops at the first problem, suggests nothing for mistyped names, and its help
and messages vary between Python versions. Here all problems are reported at once.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from utils.config.absent_options import ABSENT_VALUES
from utils.config.files import run_folder_to_come
from utils.config.option_help import help_text, names_of, opposites_of
from utils.config.options_base import MAX_PIXELS, Options, RunOptions
from utils.config.printable import printable
from utils.config.settings import Setting, settings_of
from utils.config.signals import sigterm_as_interrupt
from utils.config.suggestions import did_you_mean
from utils.config.version import version_text
from utils.errors import StoppedError, Terminated, UsageError, UserError, reason_of
from utils.words import counted

__all__ = ["exit_code_of", "parse", "run"]

AnyOptions = TypeVar("AnyOptions", bound=Options)
_MAX_LINE = 5000  # characters; a message may quote the content of a file
_NEAR_OPTION = 0.8  # fraction of characters in common, including the leading dashes
_SIDE = "imgsz"
INTERRUPTED = 130  # as in a shell: 128 plus the signal's number
PIPE_CLOSED = 141
HELP, VERSION_FLAG, DEBUG = ("-h", "--help"), "--version", "--debug"


def run(
    options_class: type[AnyOptions],
    main: Callable[[AnyOptions], object],
    description: str | None,
    argv: Sequence[str] | None = None,
) -> int:
    """Run a script: parse options from `argv` (default: the process's), call `main`, return the exit code.

    Errors that the user can fix are printed as one line on standard error: exit code 2 for options and
    settings, 1 for others. `--debug` adds the traceback. Other errors are not caught.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    open_missing_streams()

    def work() -> None:
        if not set(HELP).isdisjoint(words):
            print_out(f"{help_text(options_class, Path(sys.argv[0]).name, description or '')}\n")
        elif VERSION_FLAG in words:
            print_out(f"{version_text()}\n")
        else:
            options = parse(options_class, [word for word in words if word != DEBUG])
            for warning in options.warnings():
                print(f"warning: {one_line(warning)}", file=sys.stderr)
            if isinstance(options, RunOptions) and options.makes_folder:
                # An impossible one is told at once, not after the preparations.
                run_folder_to_come(options.project, options.name, options.exist_ok)
            _load_libraries()
            with sigterm_as_interrupt():
                main(options)

    return exit_code_of(work, debug=DEBUG in words)


def open_missing_streams() -> None:
    """Give the process streams that lead nowhere in the place of those it was started without (`>&-`)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - to the end


def _load_libraries() -> None:
    """Import the slow libraries that every script needs."""
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))  # OpenCV reads it when it is loaded
    name = ""
    try:
        for name in ("torch", "utils.nms_operator", "cv2"):
            import_at_once(name)
    except ImportError as error:
        package = f"the package {error.name or name}"
        fix = "pip install -r requirements.txt, or make setup and .venv/bin/python"
        if isinstance(error, ModuleNotFoundError):
            raise UserError("is not installed", package, fix) from error
        if name == "cv2":
            fix = "without a display, opencv-python-headless in the place of opencv-python may help"
        raise UserError(f"cannot be imported ({reason_of(error)})", package, fix) from error
    # Their hundred thousands of objects stay: no collection need look through them, nor the last one,
    # which takes a tenth of the time of a short run.
    if not gc.get_freeze_count():
        gc.freeze()


def import_at_once(name: str) -> None:
    """Import a slow library; Ctrl-C meanwhile ends the process.

    An exception during the import would leave it half loaded and raise unrelated errors.
    """

    def leave(*_: object) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: it came while something was written
            sys.stdout.flush()
        os.write(2, b"interrupted\n")
        os._exit(INTERRUPTED)

    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        importlib.import_module(name)
        return
    signal.signal(signal.SIGINT, leave)
    try:
        importlib.import_module(name)
    finally:
        signal.signal(signal.SIGINT, before)


def exit_code_of(work: Callable[[], object], *, debug: bool = False, interrupted: str = "interrupted") -> int:
    """Run the work of a command and return its exit code, printing one line if it ends early.

    debug: also print the traceback. interrupted: message after Ctrl-C.
    """
    try:
        work()
        print_out()
    except UserError as error:
        if debug:
            traceback.print_exc()
        place = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"error{place}: {one_line(str(error))}", file=sys.stderr)
        return error.exit_code
    except StoppedError as stopped:
        print(f"stopped; {stopped}", file=sys.stderr)
        return stopped.exit_code
    except Terminated as ended:
        print("terminated", file=sys.stderr)
        return ended.exit_code
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of the output (as in `| head`) has exited.
        discard_output()
        return PIPE_CLOSED
    return 0


def print_out(text: str = "") -> None:
    """Write out a text and what standard output still holds. Raises UserError if a full disk prevents it."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_output()
        what = f"cannot be written ({error.strerror or error})"
        raise UserError(what, "standard output", "give it another place") from error


def discard_output() -> None:
    """Lead standard output nowhere, where Python would report a second error on flushing it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(options_class: type[AnyOptions], words: Sequence[str]) -> AnyOptions:
    """Parse a command line into options.

    `--name value`, `--name=value`, `--switch`, `--no-switch`; names with dashes or underscores, never
    abbreviated. If a name is repeated, its last value counts. Words without a name belong to the
    positional option, if there is one.

    Raises:
        UsageError: with all problems of the command line, or if there are none, with those of the values.
    """
    reading = _Reading(options_class)
    queue = list(words)
    while queue:
        reading.take(queue)
    reading.take_loose_words()
    if reading.problems:
        raise UsageError("; ".join(reading.problems))
    return options_class(given=frozenset(reading.values), **reading.values)


def one_line(text: str) -> str:
    """Return the text on one line, shortened if very long, with control characters escaped."""
    text = re.sub(r"\s*[\r\n]+\s*", " ", text.strip())
    end = " ..." if len(text) > _MAX_LINE else ""
    return printable(text[:_MAX_LINE]) + end


@dataclass
class _Reading:
    """The state of parsing: the values and problems so far."""

    options_class: type[Options]
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.known: dict[str, Setting] = {}
        self.opposites: dict[str, Setting] = {}
        for setting in settings_of(self.options_class).values():
            self.known.update(dict.fromkeys(names_of(setting), setting))
            self.opposites.update(dict.fromkeys(opposites_of(setting), setting))
        self.latest = ""  # the previous option, for messages
        self.positional = next((s for s in self.known.values() if s.positional), None)
        self.loose: list[str] = []

    def take(self, queue: list[str]) -> None:
        """Consume one option with its values from the queue."""
        word = queue.pop(0)
        name, equals, attached = word.partition("=")
        plain = name.replace("_", "-")
        setting = self.known.get(plain) or self.opposites.get(plain)
        if self.positional is not None and not word.startswith("-"):
            self.loose.append(word)
            return
        if setting is None:
            self._complain(word, plain, queue)
            return
        self.latest = name
        if setting.switch:
            if equals:
                self.problems.append(f"{word}: {name} takes no value")
            self.values[setting.name] = plain in self.known
            return
        found = [attached] if equals else _following(setting, queue)
        if found or setting.bare is None:
            self._convert(setting, name, found)
        else:
            self.values[setting.name] = setting.bare

    def take_loose_words(self) -> None:
        """Assign the words without a name to the positional option."""
        if self.positional is not None and self.loose:
            before = self.values.get(self.positional.name, ())
            self._convert(self.positional, self.positional.flag, self.loose)
            if self.positional.name in self.values:
                self.values[self.positional.name] = (*before, *self.values[self.positional.name])

    def _convert(self, setting: Setting, name: str, found: list[str]) -> None:
        if not found:
            self.problems.append(f"{name}: needs a value, {setting.expected}")
            return
        try:
            self.values[setting.name] = setting.from_words(found)
        except ValueError as error:
            known = ((word, ABSENT_VALUES.get((setting.flag.lstrip("-"), word))) for word in found)
            absent = [f"{name} {word}: {what}" for word, what in known if what]
            self.problems += absent or [f"{name} {' '.join(found) or repr('')}: {error}"]

    def _complain(self, word: str, name: str, queue: list[str]) -> None:
        """Report an unknown option, skipping its values, or a word that belongs to no option."""
        if not word.startswith("-") or _is_number(word):
            place = f"{self.latest} takes no further value" if self.latest else "options start with --"
            more = 0
            while queue and not queue[0].startswith("-"):
                queue.pop(0)
                more += 1
            if self.latest and os.path.exists(word):
                place += "; quotes keep the shell from replacing a pattern: '*.jpg'"
            words = f"{word!r} and {counted(more, 'more word')}" if more else repr(word)
            self.problems.append(f"{words}: not expected here, {place}")
            return
        absent = self.options_class.absent.get(name.lstrip("-"))
        hint = did_you_mean("--" + name.lstrip("-"), [*self.known, *self.opposites], _NEAR_OPTION)
        what = absent or f"no such option{hint or ', see --help'}"
        self.problems.append(f"{word.partition('=')[0]}: {what}")
        while queue and not queue[0].startswith("--"):
            queue.pop(0)


def _following(setting: Setting, queue: list[str]) -> list[str]:
    """Consume the words from the queue that are the option's values."""
    found: list[str] = []
    while queue and (setting.many or not found) and not queue[0].startswith("--"):
        found.append(queue.pop(0))
    if setting.name == _SIDE and not setting.many and found and queue[:1] == found:
        queue.pop(0)  # two equal sides, as in `--img 640 640`
    return found


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-?[0-9.]+", word) is not None
