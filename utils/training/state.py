"""What a run needs to resume: the state file beside its weights.

It holds only tensors and plain values and is loaded like any weight file: nothing in it is executed.
Weight files (`last.pt`, `best.pt`) do not contain it, so a distilled student's are like any others.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import numpy as np
import torch

from models.archive import load_content
from models.yolo import Model
from utils.config.files import (
    claim_folder,
    last_written,
    next_run_folder,
    refusals,
    remove_unfinished,
    replace_atomically,
)
from utils.config.hyperparameters import Hyperparameters
from utils.config.schema import settings_from
from utils.config.suggestions import near_files, question
from utils.datasets.index import DatasetIndex
from utils.distributed import rank
from utils.errors import UserError
from utils.training.loop import Meters, Trainer

STATE_NAME = "state.pt"
ASIDE_NAME = "earlier"  # subfolder for the weights of an earlier run, with --exist-ok
VERSION = 3  # of the state file's format
# Exceptions that values of a wrong type or shape lead to.
_MISFITS = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError)
_MOST = 2**53  # largest plausible number of epochs, steps or updates


@dataclass
class RunState:
    """How far a run has got.

    epoch: the epoch to continue with, 0-based; its first batches may be done. best_fitness: -1 before the
    first validation.
    best_epoch: that of the best score. class_scores: (K,) mAP50-95 of the last validation, zeros before it.
    kind: the options class that started the run. options: its values. network: its config, with the anchors
    it is trained with. names: its classes. hyp: its hyperparameters. data: the digest of its training images.
    """

    epoch: int
    best_fitness: float
    best_epoch: int
    class_scores: list[float]
    kind: str
    options: dict[str, Any]
    network: dict[str, Any]
    names: list[str]
    hyp: dict[str, Any]
    data: str


def data_digest(index: DatasetIndex) -> str:
    """Return a digest of the images' names, sizes, order and labels, but not of the folder they are in."""
    names = "\0".join(os.path.basename(path) for path in index.paths)
    digest = hashlib.sha256(os.fsencode(names))  # file names need not be UTF-8
    for values in (index.sizes_wh, index.labelled, index.label_owners(), index.all_labels()):
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def save_state(path: Path, run: RunState, trainer: Trainer, meters: Meters | None = None) -> None:
    """Write the state to a temporary file and rename it, so a killed run leaves the previous one intact.

    meters: the epoch's, over all ranks. Without them rank 0's stand for all, as when another rank is gone.
    """
    meters = meters or trainer.meters
    # Gradients are saved without the loss scale: the run may resume in another precision.
    scale = trainer.scaler.get_scale()
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    gradients = [p.grad if trainer.pending else None for p in parameters]
    content = {
        "version": VERSION,
        "run": asdict(run),
        "model": trainer.step.model.state_dict(),
        "losses": trainer.step.losses.state_dict(),
        "ema": trainer.ema.model.state_dict(),
        "ema_updates": trainer.ema.updates,
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "guard": trainer.guard.state_dict(),
        "pending": trainer.pending,
        "done": trainer.done,
        "seconds": trainer.seconds,
        "meters": [[list(names), sums] for names, sums in meters.sums.items()],
        "gradients": [None if gradient is None else gradient / scale for gradient in gradients],
        "torch_rng": torch.get_rng_state(),
    }
    replace_atomically(path, lambda stream: torch.save(content, stream))


def find_state(resume: str, project: Path, kind: str) -> Path:
    """Find the state file that `--resume` means: that of the named run, or of the newest one.

    `resume` may be a run folder, its weights folder, or last.pt or state.pt in it; "" takes the run under
    `project` whose state was written last, preferring runs whose options are of this `kind`.
    """
    if resume:
        given = Path(resume)
        if os.path.isfile(given) and given.name not in (STATE_NAME, "last.pt"):
            fix = "name the run's folder; to train on from these weights: --weights"
            raise UserError("a run goes on from where it stopped, not from this file", given, fix)
        # A run that was stopped in its first epoch has no last.pt yet, but a state.
        is_file = os.path.isfile(given) or given.name == "last.pt"
        folders = [given.parent] if is_file else [given, given / "weights"]
        for folder in folders:
            if os.path.isfile(folder / STATE_NAME):
                return folder / STATE_NAME
        for weights in (folder / "last.pt" for folder in folders):
            if os.path.isfile(weights):
                what = f"no {STATE_NAME} beside it: of another program, or cut off before the first was saved"
                fix = f"it cannot go on; to train on from its weights: --weights {weights}"
                raise UserError(what, weights, fix)
        runs = [state.parent.parent for state in reversed(_states_in(project))]
        near = [] if os.path.exists(given) else near_files(given, runs)
        fix = question(near, "name a run folder or its weights/last.pt")
        raise UserError(f"no {STATE_NAME} to resume from", given, fix)
    states = _states_in(project)
    if not states:
        raise UserError("no run to resume", project, "name one: --resume runs/train/exp")
    own = (path for path in reversed(states) if run_state(read_state(path)).kind == kind)
    return next(own, states[-1])


def _states_in(project: Path) -> list[Path]:
    """Return the state files of the runs below a folder, newest last."""
    return sorted(project.rglob(f"weights/{STATE_NAME}"), key=last_written)


def read_state(path: Path) -> dict[str, Any]:
    """Load a state file onto the CPU. Raises UserError if it is not a valid one."""
    content = load_content(path)
    if not isinstance(content, dict) or not isinstance(content.get("run"), dict):
        raise UserError("not a run state of this project", path, "name a run folder")
    if content.get("version") != VERSION:
        raise UserError(
            "was written by another version of this project",
            path,
            "go on with that version, or start anew from its weights: --weights .../last.pt",
        )
    kinds = {name: get_origin(hint) or hint for name, hint in get_type_hints(RunState).items()}
    if {name: type(value) for name, value in content["run"].items()} != kinds:
        raise _misfit("it does not say how far the run is")
    _check_progress(content)
    return content


def _check_progress(content: dict[str, Any]) -> None:
    """Raise UserError for counts, scores and means that no run can have."""
    run = content["run"]
    counts = (run["epoch"], run["best_epoch"], *map(content.get, ("done", "pending", "ema_updates")))
    if not all(type(count) is int and 0 <= count <= _MOST for count in counts):
        raise _misfit("it does not say how far the run is")
    scores, names = run["class_scores"], run["names"]
    if not all(type(name) is str for name in names):
        raise _misfit("a class has no name")
    if len(scores) != len(names) or not all(type(score) is float for score in scores):
        raise _misfit("its scores are not those of its classes")
    try:
        sound = all(sums.shape == (2, len(names)) for names, sums in content["meters"])
    except _MISFITS as error:
        raise _misfit(error) from error
    if not sound:
        raise _misfit("its means are of another shape")


def run_state(content: dict[str, Any]) -> RunState:
    """Return how far the run of a loaded state file has got."""
    return RunState(**content["run"])


def _misfit(why: object) -> UserError:
    fix = "go on with the code that wrote it, or start anew from its weights: --weights .../last.pt"
    return UserError(f"is not an intact run state ({why})", STATE_NAME, fix)


def saved_hyp(content: dict[str, Any]) -> Hyperparameters:
    """Return the hyperparameters the run started with, whatever has become of their source files."""
    return settings_from(Hyperparameters, run_state(content).hyp, {}, Path(STATE_NAME))


def saved_network(content: dict[str, Any], names: Sequence[str], data: Path) -> Model:
    """Build the network of a loaded state file for `restore` to fill; needs no other file.

    Raises UserError if the dataset `data` no longer has the classes the run started with.
    """
    run = run_state(content)
    if list(names) != run.names:
        was, now = (", ".join(classes[:8]) for classes in (run.names, list(names)))
        raise UserError(
            f"its classes are not those the run began with: {now}; then: {was}", data, "restore them"
        )
    model = _network(run, content.get("model"))
    model.names = list(names)
    try:
        anchors = content["model"][f"model.{len(model.model) - 1}.anchors"]
        model.head.anchors.copy_(anchors)  # exact values: those in the config are rounded
    except _MISFITS as error:
        raise _misfit(error) from error
    return model


def _network(run: RunState, weights: Any) -> Model:
    """Build the network that a state describes, after checking that the state's weights match it."""
    with torch.device("meta"):  # without memory, as the description may ask for any amount
        wanted = {name: value.shape for name, value in Model(run.network).state_dict().items()}
    if not isinstance(weights, dict) or wanted != {
        name: getattr(v, "shape", 0) for name, v in weights.items()
    }:
        raise _misfit("its weights are not those of its network")
    return Model(run.network)


def open_weights(folder: Path) -> Path:
    """Claim a run's folder and return its weights folder, created and cleared of unfinished files.

    Raises:
        UserError: another process writes there, or the system refuses access.
    """
    claim_folder(folder)
    weights = folder / "weights"
    if weights.is_symlink():  # to what may be another run's folder, which is not claimed
        raise UserError(
            "is a link, and a run writes into its own folder only", weights, "move the folder here"
        )
    with refusals("cannot be made", weights):
        weights.mkdir(exist_ok=True)
    for place in (folder, weights):
        remove_unfinished(place)
    return weights


def set_weights_aside(folder: Path) -> Path | None:
    """Move what an earlier run has left in a weights folder into a subfolder, and return that.

    There its files cannot be mistaken for the new run's weights or state. The subfolder gets a number if its
    name is taken. None if there is nothing to move.
    """
    patterns = (STATE_NAME, "best.pt", "last.pt", "epoch*.pt")
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    if not found:
        return None
    aside = next_run_folder(folder, ASIDE_NAME)
    with refusals("an earlier run's weights cannot be moved", folder):
        for path in found:
            path.rename(aside / path.name)
    return aside


def restore(content: dict[str, Any], trainer: Trainer) -> None:
    """Load a state into a trainer that was built with the same options.

    Raises UserError if it does not fit.
    """
    try:
        _restore(content, trainer)
    except _MISFITS as error:
        raise _misfit(error) from error


def _restore(content: dict[str, Any], trainer: Trainer) -> None:
    trainer.step.model.load_state_dict(content["model"])
    trainer.step.losses.load_state_dict(content["losses"])
    trainer.ema.model.load_state_dict(content["ema"])
    trainer.ema.updates = content["ema_updates"]
    trainer.ema.n_averaged.fill_(content["ema_updates"])
    trainer.optimizer.load_state_dict(content["optimizer"])
    if trainer.amp_dtype is torch.float16 and content["scaler"].get("scale", 1.0) != 1.0:
        trainer.scaler.load_state_dict(content["scaler"])
    trainer.guard.load_state_dict(content["guard"])
    trainer.pending, trainer.done = content["pending"], content["done"]
    trainer.seconds = float(content.get("seconds", 0.0))
    sums = content["meters"] if rank() == 0 else ()  # they are those of all ranks
    trainer.meters = Meters({tuple(names): part.to(trainer.device) for names, part in sums})
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    scale = trainer.scaler.get_scale()
    for parameter, gradient in zip(parameters, content["gradients"], strict=True):
        if parameter.grad is not None:  # it persists
            parameter.grad.copy_(torch.zeros(()) if gradient is None else gradient.to(parameter) * scale)
        elif gradient is not None:
            parameter.grad = gradient.to(parameter) * scale
    torch.set_rng_state(content["torch_rng"])
