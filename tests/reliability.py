"""Writes docs/reliability.md from the tests: `python -m tests.reliability`, or `make reliability`.

A test that tries a fault says so: `@pytest.mark.fault("what goes wrong", "what happens then")`. Nothing
else says what the page says.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/reliability.md"
# The first that a test's path starts with is its part of the page.
PARTS = {
    "tests/fetch": "Fetched files",
    "tests/datasets/test_download": "Fetched files",
    "tests/models/test_fetched": "Fetched files",
    "tests/scripts/test_fetching": "Fetched files",
    "tests/hostile": "Hostile files",
    "tests/datasets": "Images and labels",
    "tests/config": "Settings",
    "tests/models": "Weights",
    "tests": "Runs",
}
ORDER = ("Runs", "Images and labels", "Settings", "Weights", "Fetched files", "Hostile files")
HEAD = """# Faults and how they are handled

Each row is a test that causes the fault and checks the outcome. `make reliability` generates this page from
the tests; do not edit it by hand. A test fails if the page is out of date.

Three rules always apply:

- Datasets are never modified. Corrections are made in memory only.
- An error that the user can fix ends in one line with the file, the line and what to do, and exit code 1 (2
  for invalid options and settings).
- No code from a file is executed, except for TorchScript networks, whose code is accepted only if it does
  nothing but compute. Files are written only to the run folder and the user's cache folder, exports next to
  their weights, and temporary files to the system's temporary folder (for example for a video from the
  network). Downloads go to the folder of the dataset or of the weights and never overwrite anything.

`python train.py --check-data --data ...` lists all problems of a dataset without training.
"""


@dataclass
class Faults:
    """A plugin that notes the faults which collected tests try, as (part, what, what happens, test)."""

    found: dict[tuple[str, str, str, str], None] = field(default_factory=dict)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            path = item.path.relative_to(ROOT).as_posix()
            part = next(title for start, title in PARTS.items() if path.startswith(start))
            name = getattr(item, "originalname", item.name)
            for mark in item.iter_markers("fault"):
                what, happens = mark.args
                self.found[part, what, happens, f"{path}::{name}"] = None


def collected() -> Faults:
    """The faults of all tests. Raises SystemExit where the tests cannot be collected."""
    faults, output = Faults(), io.StringIO()
    with redirect_stdout(output):
        code = pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", str(ROOT / "tests")], [faults])
    if code != pytest.ExitCode.OK:
        sys.exit(output.getvalue())
    return faults


def lines(faults: Faults) -> Iterator[str]:
    """The page, line by line; a fault that several tests try has one line."""
    yield from HEAD.splitlines()
    for part in ORDER:
        rows: dict[tuple[str, str], list[str]] = {}
        for title, what, happens, test in faults.found:
            if title == part:
                rows.setdefault((what, happens), []).append(test)
        if not rows:
            continue
        yield from ("", f"## {part}", "", "| Fault | What happens | Test |", "|---|---|---|")
        for (what, happens), tests in rows.items():
            links = ", ".join(_link(test) for test in dict.fromkeys(tests))
            yield f"| {_cell(what)} | {_cell(happens)} | {links} |"


def _link(test: str) -> str:
    path, name = test.split("::")
    words = name.removeprefix("test_").replace("_", " ")
    return f"[{words}](../{path})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Writes the page."""
    PAGE.write_text("\n".join(lines(collected())) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
