"""The public surface: no option of any script may vanish or change its meaning unnoticed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from utils.config import options as declared
from utils.config.cli import parse
from utils.config.option_help import names_of, opposites_of, written_default
from utils.config.options_base import Options
from utils.config.settings import settings_of

SCRIPTS: dict[str, type[Options]] = {
    "train.py": declared.TrainOptions,
    "train_distill.py": declared.DistillOptions,
    "test.py": declared.TestOptions,
    "detect.py": declared.DetectOptions,
    "compare.py": declared.CompareOptions,
    "export.py": declared.ExportOptions,
}
LIST = Path(__file__).with_name("options.txt")
# What a script needs beside the option that is tried; beside some options something else.
NEEDED = {"train_distill.py": ["--teacher", "t.pt"], "compare.py": ["runs/train/exp"]}
NEEDED_BESIDE = {
    ("train_distill.py", "resume"): [],
    ("compare.py", "weights"): ["--teacher", "t.pt"],
    ("compare.py", "teacher"): ["--weights", "s.pt"],
}
TRIED = {int: "64", float: "0.5", str: "some", Path: "some/path"}


def current() -> Iterator[str]:
    """A line an option, as they stand in options.txt."""
    for script, options_class in SCRIPTS.items():
        for setting in settings_of(options_class).values():
            names = " ".join(names_of(setting) + opposites_of(setting))
            yield f"{script} {names} = {written_default(setting) or '-'}"


def listed() -> list[str]:
    lines = LIST.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_options_and_defaults_are_those_of_the_list() -> None:
    now = list(current())
    assert [line for line in listed() if line not in now] == [], "vanished or changed"
    assert [line for line in now if line not in listed()] == [], "missing in tests/cli/options.txt"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option(script: str, run_script) -> None:
    done = run_script(script, "--help", env={"COLUMNS": "80"})
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    shown = set(re.findall(r"--[a-z0-9-]+", done.stdout))
    names = {
        name
        for line in listed()
        if line.startswith(f"{script} ")
        for name in line.split()[1:]
        if name[:2] == "--"
    }
    assert names <= shown


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_name_is_understood_with_dashes_and_with_underscores(script: str) -> None:
    for setting in settings_of(SCRIPTS[script]).values():
        value = setting.choices[0] if setting.choices else TRIED.get(setting.kind, "")
        for name in names_of(setting) + opposites_of(setting):
            for spelled in (name, "--" + name[2:].replace("-", "_")):
                words = [spelled] if setting.switch else [spelled, value]
                needed = NEEDED_BESIDE.get((script, setting.name), NEEDED.get(script, []))
                got = getattr(parse(SCRIPTS[script], [*needed, *words]), setting.name)
                if setting.switch:
                    assert got is (name not in opposites_of(setting))
                else:
                    assert value in str(got)
