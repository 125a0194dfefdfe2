"""Common base of the options of all scripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from utils.config.absent_options import ABSENT
from utils.config.settings import at_least, between, option, out_of_range, read_plain, to_plain
from utils.errors import UsageError

MODEL, DATA, LENGTH, LEARNING, MACHINE = "Network", "Data", "Length of the run", "Learning", "Machine"
TEACHER, DETECTIONS, RESULTS, RUNS = "Teacher", "Detections", "Results", "Runs"
GROUPS = (
    RUNS,
    MODEL,
    TEACHER,
    DATA,
    LENGTH,
    LEARNING,
    DETECTIONS,
    MACHINE,
    RESULTS,
)  # in the order of --help

# Of an image: allows 20,000 x 20,000 px. A file of a megabyte may declare any size and decompress to it.
MAX_PIXELS = 2**29
MAX_SIDE = 16_384  # a mosaic of twice that side is the largest image that OpenCV can warp
Self = TypeVar("Self", bound="Options")


def run_folders(default: str) -> Any:
    """Return the field for the parent folder of runs."""
    return option(Path(default), "folder that holds the runs", group=RESULTS)


def image_size(default: int | tuple[int, ...], help: str) -> Any:
    """Return the field for the image size, with all its public names."""
    limits = between(32, MAX_SIDE)
    return option(default, help, aliases=("img", "img-size"), limits=limits, unit="pixels", group=DATA)


def dry_run_field(help: str) -> Any:
    """Return the field for the dry run switch."""
    return option(False, f"{help}, write nothing", group=RESULTS)


def loader_workers() -> Any:
    """Return the field for the number of loader workers."""
    text = "worker processes of the loader, at most one per core; 0 loads in the main process"
    return option(8, text, limits=at_least(0), group=MACHINE)


def download_field(what: str) -> Any:
    """Return the field for the switch that allows downloading missing files."""
    return option(True, f"download {what} where missing; --no-download never does", group=DATA)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base class of all options.

    given: the fields set on the command line, whatever their value. absent: messages for well-known options
    of other implementations that are missing here, by name without leading dashes. Subclasses declare
    `weights` again, with their own type, help and default.
    """

    absent: ClassVar[Mapping[str, str]] = ABSENT
    given: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    weights: str | tuple[str, ...] = option("yolov5s.pt", "weight file", group=MODEL)
    device: str = option(
        "", "cpu, or the number of a GPU; '' takes the first GPU, else the CPU", group=MACHINE
    )

    def __post_init__(self) -> None:
        """Raise UsageError with all values that are out of range or contradictory."""
        wrong = [f"{setting.flag} {value}: {what}" for setting, value, what in out_of_range(self)]
        wrong += self.contradictions()
        if wrong:
            raise UsageError("; ".join(wrong))

    @property
    def fetches(self) -> bool:
        """Whether missing public data and weights may be downloaded; a dry run writes nothing."""
        return bool(getattr(self, "download", True)) and not getattr(self, "dry_run", False)

    def contradictions(self) -> Iterator[str]:
        """Yield contradictions between options, as `--option: what is wrong`."""
        yield from ()

    def warnings(self) -> Iterator[str]:
        """Yield warnings about options without effect or with an unexpected one."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Base class for scripts with one folder per run; subclasses declare `project` again."""

    project: Path = run_folders("runs")
    name: str = option(
        "exp", "folder of the run in --project; a number is added if it is taken", group=RESULTS
    )
    exist_ok: bool = option(False, "write into a folder that exists already", group=RESULTS)

    @property
    def makes_folder(self) -> bool:
        """Whether the run makes a folder `name` in `project`, or would without --dry-run."""
        return True

    def contradictions(self) -> Iterator[str]:
        """Yield contradictions between options, as `--option: what is wrong`."""
        yield from super().contradictions()
        if not self.name.strip("/\\. "):
            yield f"--name {self.name!r}: must be the name of a folder"


def options_to_dict(options: Options) -> dict[str, Any]:
    """Convert options to plain data: numbers, text (also for paths), lists and None."""
    return to_plain(options)


def options_from_dict(options_class: type[Self], data: Mapping[str, Any]) -> Self:
    """Rebuild options from the result of `options_to_dict`; missing ones get their defaults.

    Raises:
        UsageError: if keys are unknown or values invalid; names each.
    """
    values, problems = read_plain(options_class, data)
    if problems:
        raise UsageError("; ".join(what for _, what in problems))
    return options_class(**values)
