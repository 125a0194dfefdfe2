"""Commands for the user to copy, quoted for a shell."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.config.options import (
    CompareOptions,
    DetectOptions,
    DistillOptions,
    ExportOptions,
    Options,
    TestOptions,
    TrainOptions,
)
from utils.config.settings import Setting, settings_of

SCRIPTS: Mapping[type[Options], str] = {
    TrainOptions: "train.py",
    DistillOptions: "train_distill.py",
    TestOptions: "test.py",
    DetectOptions: "detect.py",
    CompareOptions: "compare.py",
    ExportOptions: "export.py",
}
DOUBTFUL = 0.05  # confidence threshold at which most additional boxes are wrong
# Aliases that are shorter and better known than an option's own name.
_SHORT = {"imgsz": "--img"}


def command(kind: type[Options], values: Mapping[str, Any], needed: frozenset[str] = frozenset()) -> str:
    """Return the command that runs the script of an options class with these values, in their order.

    Leaves out values that equal the script's defaults, except those of the options in `needed`.
    """
    settings, words = settings_of(kind), ["python", _script(kind)]
    for name, value in values.items():
        if name in needed or value != settings[name].default:
            words += _words(settings[name], value)
    return shlex.join(words)


def command_of(options: Options, leave_out: frozenset[str] = frozenset(), **changed: Any) -> str:
    """Return the command for these options, with those in `changed` replaced."""
    if isinstance(options, DistillOptions) and options == replace(options, distill_loss=None):
        leave_out |= {"distill_loss"}  # what it would be anyway
    values = {name: getattr(options, name) for name in settings_of(type(options)) if name not in leave_out}
    return command(type(options), {**values, **changed})


def resume_command(kind: type[TrainOptions], folder: Path, processes: int = 1, **values: Any) -> str:
    """Return the command that resumes a run or an evolution with this number of processes on one machine."""
    return _launched(command(kind, {"resume": str(folder), **values}), processes)


def start_command(options: Options, processes: int = 1) -> str:
    """Return the command that does what a dry run with these options and processes has tried."""
    return _launched(command_of(options, dry_run=False), processes)


def evolved_command(options: TrainOptions, hyp: Path) -> str:
    """Return the command that trains with the hyperparameters found by an evolution."""
    about_evolution = frozenset(
        {"evolve", "resume", "project", "name", "exist_ok", "noval", "nosave", "noplots"}
    )
    return command_of(options, about_evolution, hyp=hyp)


def after_training(options: TrainOptions, weights: Path, picture: str, batch: int) -> str:
    """Return lines with the commands that score and use the weights of a run.

    picture: an image to try them on. batch: the batch size of the run's validation.
    """
    shared = {"imgsz": options.imgsz, "device": options.device}
    scored = {
        "weights": (str(weights),),
        "data": options.data,
        "data_dir": options.data_dir,
        **shared,
        # The batch size determines which images share a shape, and so affects the scores.
        "batch_size": batch,
        "single_cls": options.single_cls,
        "workers": options.workers,
    }
    used = {"weights": (str(weights),), "source": picture, **shared, "imgsz": (options.imgsz,)}
    return (
        f"best weights: {weights}\n"
        f"score them: {command(TestOptions, scored, frozenset({'weights', 'data'}))}\n"
        f"use them: {command(DetectOptions, used, frozenset({'weights', 'source'}))}"
    )


def after_test(options: TestOptions, picture: str) -> str:
    """Return a line with the command that draws the detections of the scored weights on an image."""
    used = {
        "weights": options.weights,
        "source": picture,
        "imgsz": (options.imgsz,),
        "device": options.device,
        "half": options.half,
        "augment": options.augment,
    }
    return f"see what they find: {command(DetectOptions, used, frozenset({'weights', 'source'}))}"


def after_detection(options: DetectOptions, found: int) -> str:
    """Return a line suggesting the next command: a lower threshold, or boxes as files; else ""."""
    if not found and options.conf_thres > DOUBTFUL:
        return f"nothing found; doubtful ones too: {command_of(options, conf_thres=DOUBTFUL)}"
    if found and not (options.save_txt or options.save_csv):
        return f"boxes as files too: {command_of(options, save_txt=True, save_csv=True)}"
    return ""


def _launched(words: str, processes: int) -> str:
    return words.replace("python", f"torchrun --nproc_per_node {processes}", 1) if processes > 1 else words


def _script(kind: type[Options]) -> str:
    """Return the path of a script: next to the running one if that is one of ours."""
    running, script = Path(sys.argv[0]), SCRIPTS[kind]
    return str(running.with_name(script)) if running.name in SCRIPTS.values() else script


def _words(setting: Setting, value: Any) -> list[str]:
    flag = _SHORT.get(setting.name, setting.flag)
    if setting.switch:
        return [flag if value else f"--no-{flag.removeprefix('--')}"]
    words = [_word(entry) for entry in (value if isinstance(value, tuple) else (value,))]
    # As a separate word it would be taken for an option.
    if len(words) == 1 and words[0].startswith("--"):
        return [f"{flag}={words[0]}"]
    # Of options with several values only paths can start with dashes, and ./ does not change those.
    return [flag, *(f"./{word}" if word.startswith("--") else word for word in words)]


def _word(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)
