"""Which run to resume: the one `--resume` names, or the one that torchrun restarts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.config.command import resume_command
from utils.config.files import claim_folder, last_written, write_text_atomically
from utils.config.options import (
    CHANGEABLE_ON_RESUME,
    DistillOptions,
    TrainOptions,
    options_from_dict,
    options_to_dict,
)
from utils.distributed import from_main, rank, restarts
from utils.errors import UsageError, UserError
from utils.training import state
from utils.words import counted

LAUNCH_NAME = ".launch"
FILES = ("data", "data_dir", "weights", "cfg", "hyp", "teacher", "teacher_cfg")  # options that are paths


def resumed(options: TrainOptions) -> tuple[dict[str, Any] | None, Path | None, TrainOptions]:
    """Return the saved state, its run's folder and the options to use; the first two are None if new."""
    is_restart = restarts() > 0
    # The run's folder may exist only on the machine of rank 0.
    path, content = from_main(_claimed_state(options, is_restart) if rank() == 0 else (None, {}))
    if path is None:
        return None, None, options
    run = state.run_state(content)
    if run.kind != type(options).__name__:
        kind, folder = (
            DistillOptions if run.kind == DistillOptions.__name__ else TrainOptions,
            path.parent.parent,
        )
        raise UsageError("this run was started by the other script", folder, resume_command(kind, folder))
    saved = options_from_dict(type(options), run.options)
    # When torchrun restarts a run it repeats its command, which does not change any option.
    anew = options.given & CHANGEABLE_ON_RESUME if options.resume is not None else frozenset()
    if "epochs" in anew and options.epochs < run.epoch:
        done = f"{counted(run.epoch, 'epoch')} are done already"
        raise UsageError(done, f"--epochs {options.epochs}", f"--epochs {2 * run.epoch} adds as many")
    changed = {name: getattr(options, name) for name in anew}
    return content, path.parent.parent, replace(saved, given=anew, **changed)


def with_absolute_paths(options: TrainOptions) -> dict[str, Any]:
    """Return the options' values with absolute paths: a run may be resumed from another folder."""
    values = options_to_dict(options)

    def absolute(value: Any) -> Any:
        if isinstance(value, list):
            return [absolute(item) for item in value]
        return os.path.abspath(value) if isinstance(value, str) and value and os.path.exists(value) else value

    return {name: absolute(value) if name in FILES else value for name, value in values.items()}


def check_images(content: dict[str, Any], digest: str, data: Path, warn: Callable[[str], None]) -> None:
    """Check by their digest that the training images of a YAML are those the run started with; warn if not.

    Raises:
        UserError: they are not, and the run stopped in the middle of an epoch, whose remaining batches would
            now be different.
    """
    if digest == state.run_state(content).data:
        return
    what = "the training images or labels are not those that the run began with"
    if content.get("done"):
        fix = "bring them back, or start anew from its weights: --weights .../last.pt"
        raise UserError(f"{what}, and it stopped in the middle of an epoch", data, fix)
    warn(f"{what}; from here on it is another run than it would have been")


def note_launch(folder: Path) -> None:
    """Record in a run's folder which torchrun launch it belongs to, for when that restarts it."""
    launch = _launch()
    if launch:
        write_text_atomically(folder / LAUNCH_NAME, launch)


def _claimed_state(options: TrainOptions, is_restart: bool) -> tuple[Path | None, dict[str, Any]]:
    """Return the state file to resume from, if any, and its content; claims its run's folder."""
    path = _state_to_go_on_with(options, is_restart)
    if path is None:
        return None, {}
    claim_folder(path.parent.parent)
    return path, state.read_state(path)


def _state_to_go_on_with(options: TrainOptions, is_restart: bool) -> Path | None:
    if options.resume is not None:
        return state.find_state(options.resume, Path(options.project), type(options).__name__)
    # `torchrun --max-restarts` runs the command again after a process has died.
    if not is_restart:
        return None
    # Only the newest, as a job name may have been used before: if it has no state yet, the run of an
    # earlier job of that name is not the one to resume.
    notes = [note for note in Path(options.project).rglob(LAUNCH_NAME) if _text_of(note) == _launch()]
    newest = max(notes, key=last_written, default=None)
    saved = newest.parent / "weights" / state.STATE_NAME if newest else None
    if saved is None or not os.path.isfile(saved):
        return None
    same = state.run_state(state.read_state(saved)).options == with_absolute_paths(options)
    return saved if same else None


def _text_of(note: Path) -> str:
    try:
        return note.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _launch() -> str:
    """Return an identifier of this torchrun launch; empty without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    # Unless the user has named it, a launch is identified by its process, the parent of the ranks, and
    # that process's start time: in containers process ids repeat.
    return f"process {os.getppid()}, {_begin_of(os.getppid())}" if name == "none" else name


def _begin_of(process: int) -> str:
    """Return a process's start time since boot, with the boot's id; empty if the system does not tell."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
    return f"{fields[19]} of {boot}"  # the 22nd field of the line; two come before the bracket
