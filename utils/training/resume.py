"""Which run goes on: the one that `--resume` names, or the one that torchrun starts again."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.config.files import write_text_atomically
from utils.config.options import CHANGEABLE_ON_RESUME, TrainOptions, options_from_dict
from utils.distributed import from_main, rank
from utils.errors import UsageError
from utils.training import state

LAUNCH_NAME = ".launch"


def resumed(options: TrainOptions) -> tuple[dict[str, Any] | None, Path | None, TrainOptions]:
    """The saved state, its run's folder and the options to go on with; a new run has neither of the two."""
    path = from_main(_state_to_go_on_with(options) if rank() == 0 else None)
    if path is None:
        return None, None, options
    content = state.read_state(path)
    run = state.run_state(content)
    if run.kind != type(options).__name__:
        script, folder = script_of(run.kind), path.parent.parent
        raise UsageError(
            "this run was started by the other script", folder, f"python {script} --resume {folder}"
        )
    saved = options_from_dict(type(options), run.options)
    changed = {name: getattr(options, name) for name in options.given & CHANGEABLE_ON_RESUME}
    return content, path.parent.parent, replace(saved, **changed)


def script_of(kind: str) -> str:
    """The script whose options class is of that name."""
    return "train_distill.py" if kind == "DistillOptions" else "train.py"


def note_launch(folder: Path) -> None:
    """Leaves in a run's folder which launch by torchrun it belongs to, for when that starts it again."""
    launch = _launch()
    if launch:
        write_text_atomically(folder / LAUNCH_NAME, launch)


def _state_to_go_on_with(options: TrainOptions) -> Path | None:
    if options.resume is not None:
        return state.find_state(options.resume, Path(options.project))
    # `torchrun --max-restarts` repeats the command after a process has died.
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        for note in sorted(Path(options.project).rglob(LAUNCH_NAME)):
            saved = note.parent / "weights" / state.STATE_NAME
            if note.read_text(encoding="utf-8") == _launch() and saved.is_file():
                return saved
    return None


def _launch() -> str:
    """Tells one call of torchrun from all others; empty without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    # Unless its user has named it, a launch is known by its process, the parent of the ranks.
    return f"process {os.getppid()}" if name == "none" else name
