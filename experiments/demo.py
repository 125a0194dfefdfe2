"""`make demo`: distils a small student on the demo set, scores it and draws its boxes.

Each step is one of the project's own scripts, run as a person would run it; the commands are shown.
The student's start was trained plainly on the demo set. From there it goes on twice, with the same
data, schedule and seed: once plainly, once with a teacher. So the last two rows of the table differ
by the teacher alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from utils.config.cli import exit_code_of
from utils.config.files import next_run_folder
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TEACHER, START = Path("weights/demo_teacher.pt"), Path("weights/demo_student.pt")
DATA = ("--data", "data/demo.yaml")
IMAGE_SIZE = 320
EPOCHS = 10
PICTURES = "datasets/demo/images/test/test_0000*.png"
# With small networks and few images, drawing training batches and all plots would take longer than
# training.
TRAINING = (
    *("--batch-size", "16", "--optimizer", "AdamW", "--hyp", "data/hyp.demo.yaml"),
    *("--cache", "ram", "--noplots", "--seed", "0"),
)


@dataclass(frozen=True)
class Score:
    """The metrics of `test.py` for one weight file."""

    title: str
    map50: float
    map50_95: float
    megabytes: float


def main() -> int:
    """Run the demo and return the exit code."""
    argparse.ArgumentParser(prog="python -m experiments.demo", description=__doc__).parse_args()
    os.chdir(ROOT)
    return exit_code_of(run_demo)


def run_demo() -> None:
    """Run all steps and print the table of scores."""
    begun = time.monotonic()
    check_start()
    folder = next_run_folder(Path("runs/demo"), "exp")
    scores, pictures = run_steps(folder)
    minutes = (time.monotonic() - begun) / 60
    print(f"\n{table(scores)}\n\nScores on the 120 test images; {minutes:.1f} minutes in all.")
    print(f"Images with the distilled student's boxes: {pictures.resolve()}")


def check_start() -> None:
    """Raise UserError if the demo's weights are missing."""
    for weights in (TEACHER, START):
        if not weights.is_file():
            raise UserError("the demo's weights are missing", weights, "train them again: make demo-weights")


def run_steps(folder: Path) -> tuple[list[Score], Path]:
    """Run all steps in order; returns the scores and the folder with the drawn images."""
    step("the demo set", "-m", "utils.datasets.demo", "--out", "datasets/demo")
    go_on = ("--weights", str(START))
    plain = train(folder, f"{EPOCHS} epochs, plain", "plain", go_on)
    taught = ("--teacher", str(TEACHER), "--distill-ratio", "1")
    distilled = train(folder, f"{EPOCHS} epochs, distilled", "distilled", (*go_on, *taught))
    scores = [
        score(folder, "teacher", TEACHER),
        score(folder, "student: plain start", START),
        score(folder, f"student: {EPOCHS} more epochs, plain", plain),
        score(folder, f"student: {EPOCHS} more epochs, distilled", distilled),
    ]
    return scores, detect(folder, distilled)


def train(folder: Path, title: str, name: str, extra: tuple[str, ...]) -> Path:
    """Train into `folder/name`; returns the path of the best weights."""
    script = "train_distill.py" if "--teacher" in extra else "train.py"
    where = ("--project", str(folder), "--name", name)
    size = ("--img", str(IMAGE_SIZE), "--epochs", str(EPOCHS))
    step(title, script, *DATA, *extra, *size, *TRAINING, *where)
    return folder / name / "weights" / "best.pt"


def score(folder: Path, title: str, weights: Path) -> Score:
    """Score weights on the test split with `test.py`."""
    name = f"test-{weights.stem if weights.parent == TEACHER.parent else weights.parents[1].name}"
    where = ("--project", str(folder), "--name", name)
    size = ("--img", str(IMAGE_SIZE), "--task", "test", "--noplots")
    step(f"score: {title}", "test.py", "--weights", str(weights), *DATA, *size, *where)
    metrics = json.loads((folder / name / "metrics.json").read_text(encoding="utf-8"))
    return Score(title, metrics["map50"], metrics["map50_95"], weights.stat().st_size / 1e6)


def detect(folder: Path, weights: Path) -> Path:
    """Draw the student's boxes on a few test images; returns the folder with them."""
    where = ("--project", str(folder), "--name", "pictures")
    found = ("--source", PICTURES, "--img", str(IMAGE_SIZE))
    step("boxes on images", "detect.py", "--weights", str(weights), *DATA, *found, *where)
    return folder / "pictures"


def step(title: str, *arguments: str) -> None:
    """Run a script with this Python, with its output and progress bars on the terminal.

    Raises:
        UserError: if the script failed, after printing its own message.
    """
    print(f"\n== {title}\n$ python {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, *arguments], check=False)
    if done.returncode:
        what = f"stopped with exit code {done.returncode}"
        raise UserError(what, f"python {shlex.join(arguments)}", "see its message above")


def table(scores: list[Score]) -> str:
    """Format the scores as an aligned text table."""
    width = max(len(score.title) for score in scores)
    lines = [f"{'':{width}}  mAP50  mAP50-95    MB"]
    for entry in scores:
        lines.append(
            f"{entry.title:{width}}  {entry.map50:5.3f}  {entry.map50_95:8.3f}  {entry.megabytes:4.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
