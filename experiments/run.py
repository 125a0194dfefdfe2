"""Runs named experiments from start to end: `python -m experiments.run bccd-scratch`.

Every run is a call of this project's own scripts. What is done is kept in experiments/results and not
done again; a run that was cut short goes on. The tables of docs/experiments.md are written anew after
each run. With `--jobs` several runs share the device; what they print goes into their folders.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from experiments.arms import Arm
from experiments.plans import PLANS, TEACHERS, Plan
from experiments.report import RESULTS, ROOT, write_report
from utils.config.cli import exit_code_of
from utils.config.files import write_text_atomically
from utils.config.suggestions import did_you_mean
from utils.datasets.workers import usable_cpus
from utils.device import describe_device, select_device
from utils.errors import UserError
from utils.reporting.results import SCORES, read_results
from utils.training.precision import cpu_computes_bf16

RUNS = Path("runs/experiments")
BATCH = ("--batch-size", "16", "--cache", "ram", "--noplots")


Task = tuple[str, Arm, int, Path]  # plan, arm, seed, and the record that it leaves


def words_of(
    plan: Plan, arm: Arm, seed: int, start: Sequence[str], teacher: Path | None, precision: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Return the script of a run and its options.

    start: the plan's, with the paths of its weight files. teacher: the path of its weights.
    """
    script, options = ["train.py"], arm.options
    if teacher is not None:
        script = ["-m", "experiments.ablation", arm.ablation] if arm.ablation else ["train_distill.py"]
        options = ("--teacher", str(teacher), *arm.options)
    # No early stopping, so that all arms have the same number of updates.
    length = ("--img", str(plan.image_size), "--epochs", str(arm.epochs or plan.epochs), "--patience", "0")
    data = ("--data", arm.data or plan.data)
    return script, [*data, *start, *length, *BATCH, *precision, "--seed", str(seed), *plan.common, *options]


class Runner:
    """Runs what is missing of the plans, on one device."""

    def __init__(self, device: str, weights: Path, jobs: int = 1) -> None:
        """`weights` is the folder of the public files; `jobs` is the number of concurrent runs."""
        self.device, self.weights, self.jobs = device, weights, jobs
        self.machine = describe_device(select_device(device))
        # On a GPU AMP is the default. bf16 halves the time of a run on a CPU that supports it.
        self.precision = ("--amp-dtype", "bf16") if device == "cpu" and cpu_computes_bf16() else ()
        self._reporting = threading.Lock()

    def run(self, plans: Sequence[str], arms: Sequence[str], seeds: Sequence[int]) -> None:
        """Run what is missing of the plans, seed by seed, and write the report after each run.

        With several jobs, the failure of one does not stop the others and is raised at the end.
        """
        missing = [task for name in plans for task in self._missing(name, arms, seeds)]
        for name, arm, _, _ in missing:
            if arm.teacher is not None:
                self.teacher(arm.teacher)  # here, so that no two runs train it concurrently
                self.teacher_score(arm.teacher, name, PLANS[name])

        def work(task: Task) -> None:
            self.arm(*task)
            with self._reporting:
                write_report()

        if self.jobs == 1:
            for task in missing:
                work(task)
            return
        with ThreadPoolExecutor(self.jobs) as pool:
            running = [pool.submit(work, task) for task in missing]
            try:
                errors = [one.exception() for one in running]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # if interrupted, start no more
                raise
        failed = [
            f"{task[0]}/{task[1].name}-s{task[2]}" for task, e in zip(missing, errors, strict=True) if e
        ]
        for error in errors:
            if error is not None and not isinstance(error, UserError):
                raise error
        if failed:
            fix = "see run.log in its folder in runs/experiments"
            raise UserError("did not come to its end", ", ".join(failed), fix)

    def _missing(self, name: str, arms: Sequence[str], seeds: Sequence[int]) -> Iterator[Task]:
        plan = PLANS[name]
        for seed in seeds or range(plan.seeds):
            for arm in plan.arms:
                record = RESULTS / name / f"{arm.name}-s{seed}.json"
                if (not arms or arm.name in arms) and not record.is_file():
                    yield name, arm, seed, record

    def teacher(self, name: str) -> Path:
        """Return the path of a teacher's weights, training it if necessary."""
        teacher = TEACHERS[name]
        if teacher.options:
            options = ("--data", teacher.data, "--weights", str(self._start(teacher.weights)))
            folder = RUNS / "teachers" / name
            self._train(
                ["train.py"], (*options, *teacher.options, *BATCH, *self.precision, "--seed", "0"), folder
            )
            weights = folder / "weights" / "best.pt"
        else:
            weights = self._start(teacher.weights)
        return weights

    def teacher_score(self, name: str, plan_name: str, plan: Plan) -> None:
        """Score a teacher on the split of a plan, unless that is done."""
        record = RESULTS / plan_name / f"teacher-{name}.json"
        if not record.is_file():
            metrics, command = self._test(
                self.teacher(name), plan, plan.data, RUNS / plan_name / f"scores-{name}"
            )
            content = {"title": TEACHERS[name].title, "command": command, **self._sum_of(name), **metrics}
            self._write(record, content)

    def arm(self, name: str, arm: Arm, seed: int, record: Path) -> None:
        """Train and score one run, and write its record."""
        plan = PLANS[name]
        teacher = None if arm.teacher is None else self.teacher(arm.teacher)
        start = tuple(str(self._start(word)) if word.endswith(".pt") else word for word in plan.start)
        script, words = words_of(plan, arm, seed, start, teacher, self.precision)
        folder = RUNS / name / f"{arm.name}-s{seed}"
        begun = time.monotonic()
        command = self._train(script, words, folder)
        seconds = time.monotonic() - begun
        weights, scores = folder / "weights" / f"{plan.choice}.pt", folder.with_name(f"scores-{folder.name}")
        metrics, _ = self._test(weights, plan, plan.data, scores)
        curves = read_results(folder / "results.csv")
        content = {
            "arm": arm.name,
            "seed": seed,
            "command": command,
            "machine": self.machine,
            "torch": torch.__version__,
            "seconds": round(seconds),
            **({"jobs": self.jobs} if self.jobs > 1 else {}),
            **(self._sum_of(arm.teacher) if arm.teacher is not None else {}),
            **metrics,
            "val_map50": _scored(curves[SCORES[2]].tolist()),
            "val_map50_95": _scored(curves[SCORES[3]].tolist()),
        }
        self._write(record, content)

    def _sum_of(self, teacher: str) -> dict[str, str]:
        """Return the checksum of a teacher's weights, by which a retrained one can be told apart."""
        return {"teacher_sha256": hashlib.sha256(self.teacher(teacher).read_bytes()).hexdigest()}

    def _start(self, weights: str) -> Path:
        """Return the path of a weight file: as given, or in the folder of the public files."""
        path = Path(weights)
        path = path if path.is_file() else self.weights / path.name
        if not path.is_file():
            raise UserError("is not there", path, "download it, or name its folder with --weights-dir")
        return path

    def _train(self, script: Sequence[str], words: Sequence[str], folder: Path) -> str:
        """Train into the folder unless that is done, resuming an interrupted run; returns the command.

        Raises UserError if the folder belongs to another command, because the plan has changed.
        """
        place = ("--project", str(folder.parent), "--name", folder.name, "--exist-ok")
        command = shlex.join(("python", *script, *words))
        begun = folder / "command"
        if begun.is_file() and begun.read_text(encoding="utf-8").strip() != command:
            raise UserError("was made by another command", folder, "remove it, and it is made anew")
        if (folder / "done").is_file():
            return command
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(begun, command + "\n")
        if (folder / "weights" / "state.pt").is_file():
            self._call(folder, *script, "--resume", str(folder), "--device", self.device)
        else:
            self._call(folder, *script, *words, *place, "--device", self.device)
        (folder / "done").touch()
        return command

    def _test(self, weights: Path, plan: Plan, data: str, scores: Path) -> tuple[dict[str, float], str]:
        """Score weights on the plan's split, into the folder `scores`; returns metrics and command."""
        size = ("--img", str(plan.image_size), "--task", plan.split)
        words = ("test.py", "--weights", str(weights), "--data", data, *size)
        place = ("--project", str(scores.parent), "--name", scores.name, "--exist-ok", "--noplots")
        scores.mkdir(parents=True, exist_ok=True)
        self._call(scores, *words, *place, "--device", self.device)
        metrics = json.loads((scores / "metrics.json").read_text(encoding="utf-8"))
        command = shlex.join(("python", *words))
        return {key: round(metrics[key], 5) for key in ("map50", "map50_95")}, command

    def _call(self, folder: Path, *words: str) -> None:
        """Run a script; with several jobs its output goes to run.log in its folder."""
        print(f"$ python {shlex.join(words)}", flush=True)
        if self.jobs == 1:
            done = subprocess.run([sys.executable, *words], check=False)
        else:
            cores = max(usable_cpus() // self.jobs, 1)
            shared = {**os.environ, "OMP_NUM_THREADS": str(cores)}
            with (folder / "run.log").open("a", encoding="utf-8") as log:
                command = [sys.executable, *words, "--workers", str(cores)]
                done = subprocess.run(command, check=False, stdout=log, stderr=log, env=shared)
        if done.returncode:
            where = "see its message above" if self.jobs == 1 else f"see {folder / 'run.log'}"
            raise UserError(f"exit code {done.returncode}", shlex.join(words), where)

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(content, indent=1) + "\n")


def _scored(values: list[float]) -> list[float]:
    """Return the finite values, those of the epochs that were scored."""
    return [round(value, 5) for value in values if math.isfinite(value)]


def main() -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.run", description=__doc__)
    listed = f"experiments to run ({', '.join(PLANS)}); none: tables only"
    parser.add_argument("plans", nargs="*", metavar="EXPERIMENT", help=listed)
    parser.add_argument("--arms", nargs="+", default=[], help="these of their arms alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="these seeds; default: all")
    parser.add_argument("--device", default="cpu", help="cpu, or the number of a GPU")
    parser.add_argument(
        "--weights-dir", type=Path, default=Path("weights"), help="folder of the public files"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    given = parser.parse_args()
    for name in given.plans:
        if name not in PLANS:
            parser.error(f"{name}: no such experiment{did_you_mean(name, PLANS)}")
    if given.jobs < 1:
        parser.error("--jobs: at least 1")
    os.chdir(ROOT)

    def work() -> None:
        runner = Runner(given.device, given.weights_dir, given.jobs)
        runner.run(given.plans, given.arms, given.seeds)
        write_report()

    return exit_code_of(work)


if __name__ == "__main__":
    sys.exit(main())
