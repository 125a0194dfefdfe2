"""The README says what the scripts do."""

import re
from pathlib import Path

from utils.config import options as declared
from utils.config.cli import parse
from utils.config.readme import with_option_tables

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPTIONS = {
    "train": declared.TrainOptions,
    "train_distill": declared.DistillOptions,
    "test": declared.TestOptions,
    "detect": declared.DetectOptions,
    "compare": declared.CompareOptions,
    "export": declared.ExportOptions,
}


def test_the_option_tables_are_those_of_the_scripts():
    assert README == with_option_tables(README), "run `make readme`"


def test_every_command_of_the_readme_has_options_that_exist():
    text = README.replace("\\\n", " ")
    commands = re.findall(r"python (\w+)\.py ((?:--|runs/)[^\n`]+)", text)
    assert len(commands) >= 6
    for script, arguments in commands:
        words = ["" if word == "''" else word for word in arguments.replace("...", "x.yaml").split()]
        parse(OPTIONS[script], words)


def test_every_file_that_the_documents_link_to_exists():
    for document in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
