"""What the options of all scripts share."""

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

MAX_SIDE = 16_384  # a mosaic of twice that side is the largest picture that OpenCV can warp
Self = TypeVar("Self", bound="Options")


def run_folders(default: str) -> Any:
    """The field of the folder that holds the folders of runs."""
    return option(Path(default), "folder that holds the runs", group=RESULTS)


def image_size(default: int | tuple[int, ...], help: str) -> Any:
    """The field of a picture's side, under all its public names."""
    limits = between(32, MAX_SIDE)
    return option(default, help, aliases=("img", "img-size"), limits=limits, unit="pixels", group=DATA)


def rehearsal(help: str) -> Any:
    """The field of the switch that stops before the work."""
    return option(False, f"{help}, write nothing", group=RESULTS)


def loader_workers() -> Any:
    """The field of the number of processes that make batches."""
    text = "worker processes of the loader, at most one per core; 0 loads in the main process"
    return option(8, text, limits=at_least(0), group=MACHINE)


def may_fetch(what: str) -> Any:
    """The field that allows the network where a file is missing."""
    return option(True, f"download {what} where missing; --no-download never does", group=DATA)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all options objects share.

    given: the fields that the command line named, whatever value it gave them. A script's own class
    declares `weights` again, with its own words and default. absent: what to say of options that it
    lacks and people know, by name without dashes in front.
    """

    absent: ClassVar[Mapping[str, str]] = ABSENT
    given: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    weights: str = option("yolov5s.pt", "weight file", group=MODEL)
    device: str = option(
        "", "cpu, or the number of a GPU; '' takes the first GPU, else the CPU", group=MACHINE
    )

    def __post_init__(self) -> None:
        """Raises UsageError with everything that is out of range or contradicts itself."""
        wrong = [f"{setting.flag} {value}: {what}" for setting, value, what in out_of_range(self)]
        wrong += self.contradictions()
        if wrong:
            raise UsageError("; ".join(wrong))

    @property
    def fetches(self) -> bool:
        """Whether what is missing of public data and weights may be fetched: a dry run writes nothing."""
        return bool(getattr(self, "download", True)) and not getattr(self, "dry_run", False)

    def contradictions(self) -> Iterator[str]:
        """What cannot be meant, each as `--option: what is wrong`."""
        yield from ()

    def remarks(self) -> Iterator[str]:
        """What was given and has no effect, each as `--option: why`."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """The options of a script whose runs have a folder each; `project` is declared again as `weights` is."""

    project: Path = run_folders("runs")
    name: str = option(
        "exp", "folder of the run in --project; a number is added if it is taken", group=RESULTS
    )
    exist_ok: bool = option(False, "write into a folder that exists already", group=RESULTS)

    def contradictions(self) -> Iterator[str]:
        """What cannot be meant, each as `--option: what is wrong`."""
        yield from super().contradictions()
        if not self.name.strip("/\\. "):
            yield f"--name {self.name!r}: must be the name of a folder"


def options_to_dict(options: Options) -> dict[str, Any]:
    """The values as plain data: numbers, text (paths too), lists and None."""
    return to_plain(options)


def options_from_dict(options_class: type[Self], data: Mapping[str, Any]) -> Self:
    """The options that `options_to_dict` described; what is missing has its default.

    Raises:
        UsageError: names every unknown key and every wrong value.
    """
    values, problems = read_plain(options_class, data)
    if problems:
        raise UsageError("; ".join(what for _, what in problems))
    return options_class(**values)
