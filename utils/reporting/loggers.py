"""TensorBoard and Weights & Biases, for those who have them and ask for them.

Both are optional: imported where a run is to log to them, and nowhere else. results.csv is written
whatever becomes of them.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import cv2

from utils.config.files import write_text_atomically
from utils.config.schema import yaml_text
from utils.errors import UsageError

WANDB_ID = "wandb_id.txt"
WANDB_PROJECT = "yolov5-distillation"  # unless the runs' folder or the user's environment names another
PICTURES = (".jpg", ".png")
# What to import and what to install, by the name that the option has for it.
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
NEEDED = {"tensorboard": "SummaryWriter", "wandb": "init"}


class Logger(Protocol):
    """Somewhere to log a run to."""

    def settings(self, values: Mapping[str, Any], epoch: int) -> None:
        """Takes in options and hyperparameters, plain values by name, as they are from an epoch on."""

    def scalars(self, values: Mapping[str, float], epoch: int) -> None:
        """Takes in what an epoch came to, finite numbers by name."""

    def picture(self, path: Path, epoch: int) -> None:
        """Takes in a picture as it is after an epoch."""

    def close(self) -> None:
        """Ends the log in good order."""


class TensorBoardLogger:
    """Event files in the run's folder: `tensorboard --logdir runs/train` shows all runs below it."""

    def __init__(self, folder: Path, start_epoch: int) -> None:
        """What an earlier process has logged of `start_epoch` and later ones counts no more."""
        self._writer = _module("tensorboard").SummaryWriter(str(folder), purge_step=start_epoch)

    def settings(self, values: Mapping[str, Any], epoch: int) -> None:
        """As text, for TensorBoard keeps no other values."""
        indented = "".join(f"    {line}\n" for line in yaml_text(dict(values)).splitlines())  # a code block
        self._writer.add_text("settings", indented, epoch)
        self._writer.flush()

    def scalars(self, values: Mapping[str, float], epoch: int) -> None:
        """One curve a name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def picture(self, path: Path, epoch: int) -> None:
        """Under the file's name."""
        image = cv2.imread(str(path))
        if image is not None:
            self._writer.add_image(path.stem, image[..., ::-1].copy(), epoch, dataformats="HWC")

    def close(self) -> None:
        """Writes what waits."""
        self._writer.close()


class WandbLogger:
    """A run of Weights & Biases; its id stays in the run's folder, so that `--resume` goes on with it."""

    def __init__(self, folder: Path, project: str, *, resuming: bool) -> None:
        """`resuming` continues the log that the folder knows; a new run begins a new one."""
        self._wandb = _module("wandb")
        note = folder / WANDB_ID
        known = note.read_text(encoding="utf-8").strip() if resuming and note.is_file() else None
        self._run = self._wandb.init(
            project=project, name=folder.name, dir=str(folder), id=known, resume="allow" if known else None
        )
        write_text_atomically(note, f"{self._run.id}\n")

    def settings(self, values: Mapping[str, Any], epoch: int) -> None:
        """As the run's config."""
        self._run.config.update(dict(values), allow_val_change=True)

    def scalars(self, values: Mapping[str, float], epoch: int) -> None:
        """One row a step, the steps being epochs."""
        self._run.log(dict(values), step=epoch)

    def picture(self, path: Path, epoch: int) -> None:
        """Under the file's name."""
        self._run.log({f"pictures/{path.stem}": self._wandb.Image(str(path))}, step=epoch)

    def close(self) -> None:
        """Waits until all is sent."""
        self._run.finish()


class Loggers:
    """All loggers of a run. One that fails is warned of once and left out from then on."""

    def __init__(
        self,
        folder: Path,
        makers: Mapping[str, Callable[[], Logger]],
        warn: Callable[[str], None],
        start_epoch: int = 0,
    ) -> None:
        """`makers` open each; pictures that lie in the folder by now are an earlier process's."""
        self.folder, self._warn = folder, warn
        self._open: dict[str, Logger] = {}
        self._epoch = start_epoch
        self._sent = dict(self._pictures()) if makers else {}
        for name, make in makers.items():
            self._guarded(name, partial(self._begin, name, make))

    def settings(self, values: Mapping[str, Any]) -> None:
        """Options and hyperparameters."""
        self._each(lambda logger: logger.settings(values, self._epoch))

    def epoch(self, epoch: int, values: Mapping[str, float | None]) -> None:
        """A row of results.csv, without its blanks, and the pictures that are new since the last."""
        self._epoch = epoch
        known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        self._each(lambda logger: logger.scalars(known, epoch))
        self._send_pictures()

    def close(self) -> None:
        """Sends the last pictures and ends all logs."""
        self._send_pictures()
        self._each(lambda logger: logger.close())
        self._open.clear()

    def _send_pictures(self) -> None:
        for path, changed in self._pictures() if self._open else ():
            if self._sent.get(path) != changed:
                self._sent[path] = changed
                for name, logger in list(self._open.items()):
                    self._guarded(name, partial(logger.picture, path, self._epoch))

    def _pictures(self) -> list[tuple[Path, int]]:
        """The pictures in the run's folder, and when each was written."""
        try:
            found = sorted(path for path in self.folder.iterdir() if path.suffix in PICTURES)
            return [(path, path.stat().st_mtime_ns) for path in found]
        except OSError:  # somebody tidies up there: no reason to end a run
            return []

    def _each(self, act: Callable[[Logger], None]) -> None:
        for name, logger in list(self._open.items()):
            self._guarded(name, partial(act, logger))

    def _begin(self, name: str, make: Callable[[], Logger]) -> None:
        self._open[name] = make()

    def _guarded(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever a service or its package throws: the run is worth more
            self._open.pop(name, None)
            reason = str(error).strip() or type(error).__name__
            self._warn(f"--logger {name}: failed ({reason}); the run goes on without it")


def check_loggers(names: Sequence[str]) -> None:
    """Passes loggers whose packages can be imported.

    Raises:
        UsageError: one is not installed, or its package does not work here.
    """
    for name in names:
        try:
            module = _module(name)
        except ImportError as error:
            raise UsageError(
                f"is not installed ({error})", f"--logger {name}", f"pip install {name}, or leave it out"
            ) from error
        except Exception as error:  # TensorBoard under a protobuf that it does not fit, for one
            what = f"cannot be imported ({error})"
            raise UsageError(what, f"--logger {name}", f"pip install -U {name}, or leave it out") from error
        if not hasattr(module, NEEDED[name]):  # a folder of that name beside the scripts passes for one
            raise UsageError("is not installed", f"--logger {name}", f"pip install {name}, or leave it out")


def open_loggers(
    names: Sequence[str], folder: Path, warn: Callable[[str], None], start_epoch: int, *, resuming: bool
) -> Loggers:
    """The loggers of a run, which go on with what they have where the run goes on."""
    if not resuming:  # --exist-ok: an earlier run's log is not to be gone on with
        (folder / WANDB_ID).unlink(missing_ok=True)
    own = folder.resolve().parent.name
    project = os.environ.get("WANDB_PROJECT") or (own if own not in ("", "train") else WANDB_PROJECT)
    makers: dict[str, Callable[[], Logger]] = {
        "tensorboard": lambda: TensorBoardLogger(folder, start_epoch),
        "wandb": lambda: WandbLogger(folder, project, resuming=resuming),
    }
    return Loggers(folder, {name: makers[name] for name in dict.fromkeys(names)}, warn, start_epoch)


def _module(name: str) -> ModuleType:
    return importlib.import_module(MODULES[name])
