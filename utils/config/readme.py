"""Write the option tables of the README: `python -m utils.config.readme README.md`."""

from __future__ import annotations

import sys
from pathlib import Path

from utils.config.files import write_text_atomically
from utils.config.option_help import option_table
from utils.config.options import (
    CompareOptions,
    DetectOptions,
    DistillOptions,
    ExportOptions,
    TestOptions,
    TrainOptions,
)

BEGIN = "<!-- options: begin (written by `make readme`, held by a test) -->\n"
END = "<!-- options: end -->\n"


def option_tables() -> str:
    """Return the option tables of all scripts as Markdown; train_distill.py's omits those of train.py."""
    parts = [
        ("`train.py`", option_table(TrainOptions)),
        ("`train_distill.py`: those of `train.py`, and", option_table(DistillOptions, beyond=TrainOptions)),
        ("`test.py`", option_table(TestOptions)),
        ("`detect.py`", option_table(DetectOptions)),
        ("`compare.py`", option_table(CompareOptions)),
        ("`export.py`", option_table(ExportOptions)),
    ]
    return "".join(f"\n### {title}\n\n{table}" for title, table in parts) + "\n"


def with_option_tables(text: str) -> str:
    """Replace the tables between the two marks in the README's text."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{option_tables()}{END}{after}"


if __name__ == "__main__":
    readme = Path(sys.argv[1])
    write_text_atomically(readme, with_option_tables(readme.read_text(encoding="utf-8")))
