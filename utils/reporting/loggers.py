"""Logging to TensorBoard and Weights & Biases, if installed and requested.

Both are optional and imported only for runs that log to them. results.csv is written whatever happens to
them.
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
WANDB_PROJECT = "yolov5-distillation"  # unless the runs' folder or the environment names another
PICTURES = (".jpg", ".png")
# By --logger name, also that of the package to install: the module to import and an attribute it must have.
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
NEEDED = {"tensorboard": "SummaryWriter", "wandb": "init"}


class Logger(Protocol):
    """A backend to log a run to."""

    def settings(self, values: Mapping[str, Any], epoch: int) -> None:
        """Log options and hyperparameters, plain values by name, as they are from an epoch on."""

    def scalars(self, values: Mapping[str, float], epoch: int) -> None:
        """Log the values of an epoch, finite numbers by name."""

    def picture(self, path: Path, epoch: int) -> None:
        """Log a plot as it is after an epoch."""

    def close(self) -> None:
        """Close the log properly."""


class TensorBoardLogger:
    """Event files in the run's folder: `tensorboard --logdir runs/train` shows all runs below it."""

    def __init__(self, folder: Path, start_epoch: int) -> None:
        """Events that an earlier process logged for `start_epoch` or later are discarded."""
        self._writer = _module("tensorboard").SummaryWriter(str(folder), purge_step=start_epoch)

    def settings(self, values: Mapping[str, Any], epoch: int) -> None:
        """Log as text, since TensorBoard keeps no other values."""
        indented = "".join(f"    {line}\n" for line in yaml_text(dict(values)).splitlines())  # a code block
        self._writer.add_text("settings", indented, epoch)
        self._writer.flush()

    def scalars(self, values: Mapping[str, float], epoch: int) -> None:
        """Log one curve per name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def picture(self, path: Path, epoch: int) -> None:
        """Log under the file's name."""
        image = cv2.imread(str(path))
        if image is not None:
            self._writer.add_image(path.stem, image[..., ::-1].copy(), epoch, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbLogger:
    """A Weights & Biases run; its id is kept in the run's folder, so that `--resume` continues it."""

    def __init__(self, folder: Path, project: str, *, resuming: bool) -> None:
        """`resuming` continues the log whose id is in the folder; otherwise a new one is started."""
        self._wandb = _module("wandb")
        note = folder / WANDB_ID
        known = note.read_text(encoding="utf-8").strip() if resuming and note.is_file() else None
        self._run = self._wandb.init(
            project=project, name=folder.name, dir=str(folder), id=known, resume="allow" if known else None
        )
        write_text_atomically(note, f"{self._run.id}\n")

    def settings(self, values: Mapping[str, Any], epoch: int) -> None:
        """Log as the run's config."""
        self._run.config.update(dict(values), allow_val_change=True)

    def scalars(self, values: Mapping[str, float], epoch: int) -> None:
        """Log one row per step, steps being epochs."""
        self._run.log(dict(values), step=epoch)

    def picture(self, path: Path, epoch: int) -> None:
        """Log under the file's name."""
        self._run.log({f"plots/{path.stem}": self._wandb.Image(str(path))}, step=epoch)

    def close(self) -> None:
        """Wait until everything is uploaded."""
        self._run.finish()


class Loggers:
    """All loggers of a run. One that fails causes one warning and is left out from then on."""

    def __init__(
        self,
        folder: Path,
        makers: Mapping[str, Callable[[], Logger]],
        warn: Callable[[str], None],
        start_epoch: int = 0,
    ) -> None:
        """`makers` open each logger; plots already in the folder are an earlier process's and not sent."""
        self.folder, self._warn = folder, warn
        self._open: dict[str, Logger] = {}
        self._epoch = start_epoch
        self._sent = dict(self._pictures()) if makers else {}
        for name, make in makers.items():
            self._guarded(name, partial(self._begin, name, make))

    def settings(self, values: Mapping[str, Any]) -> None:
        """Log options and hyperparameters."""
        self._each(lambda logger: logger.settings(values, self._epoch))

    def epoch(self, epoch: int, values: Mapping[str, float | None]) -> None:
        """Log a row of results.csv without its blanks, and the plots that have changed since the last one."""
        self._epoch = epoch
        known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        self._each(lambda logger: logger.scalars(known, epoch))
        self._send_plots()

    def close(self) -> None:
        """Send the last plots and close all logs."""
        self._send_plots()
        self._each(lambda logger: logger.close())
        self._open.clear()

    def _send_plots(self) -> None:
        for path, changed in self._pictures() if self._open else ():
            if self._sent.get(path) != changed:
                self._sent[path] = changed
                for name, logger in list(self._open.items()):
                    self._guarded(name, partial(logger.picture, path, self._epoch))

    def _pictures(self) -> list[tuple[Path, int]]:
        """Return the plots in the run's folder and when each was written."""
        try:
            found = sorted(path for path in self.folder.iterdir() if path.suffix in PICTURES)
            return [(path, path.stat().st_mtime_ns) for path in found]
        except OSError:  # files may be deleted meanwhile: no reason to end a run
            return []

    def _each(self, act: Callable[[Logger], None]) -> None:
        for name, logger in list(self._open.items()):
            self._guarded(name, partial(act, logger))

    def _begin(self, name: str, make: Callable[[], Logger]) -> None:
        self._open[name] = make()

    def _guarded(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever a service or its package raises must not end the run
            self._open.pop(name, None)
            reason = str(error).strip() or type(error).__name__
            self._warn(f"--logger {name}: failed ({reason}); the run goes on without it")


def check_loggers(names: Sequence[str]) -> None:
    """Check that the packages of these loggers can be imported.

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
        except Exception as error:  # e.g. TensorBoard with an incompatible protobuf
            what = f"cannot be imported ({error})"
            raise UsageError(what, f"--logger {name}", f"pip install -U {name}, or leave it out") from error
        if not hasattr(module, NEEDED[name]):  # a folder of that name can be imported as well
            raise UsageError("is not installed", f"--logger {name}", f"pip install {name}, or leave it out")


def open_loggers(
    names: Sequence[str], folder: Path, warn: Callable[[str], None], start_epoch: int, *, resuming: bool
) -> Loggers:
    """Open the loggers of a run; those of a resumed run continue their logs."""
    if not resuming:  # --exist-ok: an earlier run's log must not be continued
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
