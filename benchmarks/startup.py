"""The start of the scripts: `python -m benchmarks.startup --data data/demo.yaml`.

Whole processes that do next to nothing, against one that only imports torch.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import load, medians, ms, parser, table

IMPORT = "`import torch`"


def commands(weights: str, data: str, image: str, size: str) -> dict[str, list[str]]:
    """Return the arguments of Python for each process."""
    common = ["--weights", weights, "--img", size, "--device", "cpu"]
    labelled = [*common, "--data", data, "--dry-run"]
    return {
        IMPORT: ["-c", "import torch"],
        "`detect.py`, one image": ["detect.py", *common, "--source", image],
        "`test.py --dry-run`, one batch": ["test.py", *labelled, "--batch", "4"],
        "`train.py --dry-run`, one step": ["train.py", *labelled, "--batch", "4", "--workers", "0"],
    }


def main() -> None:
    options = parser(__doc__, rounds=7, device=False)
    options.add_argument("--weights", default="weights/demo_student.pt")
    options.add_argument("--data", default="data/demo.yaml")
    options.add_argument("--source", default=str(next(Path("data/images").glob("*.jpg"))))
    options.add_argument("--img", default="320")
    given = options.parse_args()
    print(f"torch {torch.__version__}, {load()}")
    with tempfile.TemporaryDirectory() as folder:

        def run(words: list[str]) -> None:
            place = [] if words[0] == "-c" else ["--project", folder]
            done = subprocess.run([sys.executable, *words, *place], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)  # such as: the data is not there

        listed = commands(given.weights, given.data, given.source, given.img)
        work: dict[str, Callable[[], object]] = {name: partial(run, words) for name, words in listed.items()}
        times = medians(work, given.rounds, torch.device("cpu"), warm=1)
    rows = [[name, ms(value), f"{value / times[IMPORT]:.2f}"] for name, value in times.items()]
    table(["process", "median", f"relative to {IMPORT}"], rows)


if __name__ == "__main__":
    main()
