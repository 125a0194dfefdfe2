"""Groups of runs that differ only in their seed, and their labels."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from utils.comparison.runs import Run
from utils.config.hyperparameters import Hyperparameters
from utils.config.options import OWN_AVERAGE, DistillOptions, TrainOptions
from utils.config.options_distill import idle_settings
from utils.config.settings import settings_of, to_plain
from utils.config.suggestions import near_names, question
from utils.errors import UsageError
from utils.reporting.naming import weights_name
from utils.words import counted

Values = dict[str, Any]

# Options that do not affect a run's outcome, or only say where its files are.
WITHOUT_EFFECT = frozenset(
    {
        *("seed", "name", "project", "exist_ok", "resume", "device", "workers", "cache", "data_dir"),
        *("nosave", "noval", "noplots", "save_period", "save_every_steps", "logger", "check_data", "hyp"),
        *("download", "dry_run", "compile", "cuda_graphs"),
    }
)
TAUGHT_ONLY = frozenset(settings_of(DistillOptions)) - frozenset(settings_of(TrainOptions))
# Options already told by the first words of a label.
IN_LABEL = frozenset({"distill", "distill_loss", "teacher", "soft_loss", "full_output_loss"})
HYP = "hyp."
_MOST_DETAILS = 6  # in a label


@dataclass(frozen=True, eq=False)
class Group:
    """Runs with the same settings; values: these settings, None if unknown."""

    label: str
    runs: tuple[Run, ...]
    values: Values | None
    is_distilled: bool

    def is_twin_of(self, other: Group, ignored: frozenset[str]) -> bool:
        """Return whether this is plain training and the other the same with a teacher."""
        if self.values is None or other.values is None or self.is_distilled or not other.is_distilled:
            return False
        return all(
            other.values.get(name) == value for name, value in self.values.items() if name not in ignored
        )

    def by_seed(self, figures: Mapping[Run, float]) -> dict[int, float]:
        """Return its runs' figures by seed, or by position without one; the mean if several share a seed."""
        return {
            seed: statistics.mean(figures[run] for run in runs) for seed, runs in self.runs_by_seed().items()
        }

    def runs_by_seed(self) -> dict[int, list[Run]]:
        """Return its runs by seed, or by position without one."""
        found: dict[int, list[Run]] = {}
        for number, run in enumerate(self.runs):
            found.setdefault(number if run.seed is None else run.seed, []).append(run)
        return found


def values_of(run: Run) -> Values | None:
    """Return the settings that affect a run's outcome, by name: options, and hyperparameters as `hyp.lr0`.

    Files count by their names, whatever folder they are in, and a run's best.pt by the name of the run.
    Options that an earlier version did not have are at their defaults. A run without a teacher has no
    distillation settings, one with a teacher none that have no effect.
    """
    if run.options is None:
        return None
    values = {**to_plain(DistillOptions(distill=False)), **run.options}
    taught = bool(run.options.get("teacher")) and run.options.get("distill", True) is not False
    kept = {
        name: _by_name(name, values[name])
        for name in settings_of(DistillOptions)
        if name not in WITHOUT_EFFECT and (taught or name not in TAUGHT_ONLY)
    }
    if taught:
        kept.update(distill=True, teacher=_listed(kept["teacher"]))
        resolved = {**values, "distill_loss": values["distill_loss"] or "response"}
        # The second only names a `distill_loss`; the third has an effect where no class is shared.
        for name in {*idle_settings(resolved), "full_output_loss"} - {"feature_ratio"}:
            kept.pop(name, None)
    return {**kept, **{HYP + k: v for k, v in run.hyp.items()}}


def group_runs(runs: Sequence[Run], ignored: Sequence[str] = (), together: bool = True) -> list[Group]:
    """Group runs by their settings, plain ones first, otherwise in the given order.

    ignored: settings that do not separate groups. together: False makes each run a group of its own.

    Raises:
        UsageError: a setting to ignore does not exist.
    """
    ignoring = known_settings(ignored)
    members: dict[str, list[Run]] = {}
    values = {run: values_of(run) for run in runs}
    for run in runs:
        own = values[run]
        key = str(run.folder)
        if own is not None and together:
            key = repr(sorted((name, value) for name, value in own.items() if name not in ignoring))
        members.setdefault(key, []).append(run)
    firsts = [values[group[0]] for group in members.values()]
    differing = [name for name in differing_settings(firsts) if name not in ignoring | IN_LABEL]
    labels = [_label(group[0], own, differing) for group, own in zip(members.values(), firsts, strict=True)]
    tails = distinct_tails([group[0].folder for group in members.values()])
    groups = []
    for group, own, label, tail in zip(members.values(), firsts, labels, tails, strict=True):
        if labels.count(label) > 1:
            label = tail if own is None else f"{label}, {tail}"
        groups.append(Group(label + _counted(group), tuple(group), own, bool(own and "teacher" in own)))
    return sorted(groups, key=lambda group: group.is_distilled)


def distinct_tails(paths: Sequence[Path]) -> list[str]:
    """Return the ends of paths, each as long as needed to be unique: `exp2`, `first/exp`."""
    parts = [path.parts for path in paths]

    def tail(own: tuple[str, ...]) -> str:
        lengths = range(1, len(own) + 1)
        unique = (n for n in lengths if sum(other[-n:] == own[-n:] for other in parts) == 1)
        return PurePath(*own[-next(unique, len(own)) :]).as_posix()

    return [tail(own) for own in parts]


def known_settings(names: Sequence[str]) -> frozenset[str]:
    """Return names of options and hyperparameters as in `values_of`. Raises UsageError for unknown ones."""
    options, hyp = settings_of(DistillOptions), settings_of(Hyperparameters)
    found: set[str] = set()
    for name in names:
        plain = name.lstrip("-").replace("-", "_")
        own = {plain} & set(options) | {HYP + plain for plain in {plain} & set(hyp)}
        if plain == "hyp":  # all that the file says
            own |= {HYP + key for key in hyp}
        if not own:
            otherwise = "name options of train_distill.py or keys of a hyperparameter file"
            fix = question(near_names(plain, [*options, *hyp], 1), otherwise)
            raise UsageError("no such setting", f"--ignore {name}", fix)
        found |= own
    return frozenset(found)


def differing_settings(all_values: Sequence[Values | None]) -> list[str]:
    """Return the settings that differ among those that have them.

    `teacher` and `distill_loss` count as well if only some have one.
    """
    known = [values for values in all_values if values is not None]
    names = dict.fromkeys(name for values in known for name in values)
    found = []
    for name in names:
        different = {repr(values[name]) for values in known if name in values}
        some_only = name in ("teacher", "distill_loss") and any(name not in values for values in known)
        if len(different) > 1 or some_only:
            found.append(name)
    return found


def different_data(groups: Sequence[Group]) -> list[str]:
    """Return what the groups' scores were measured on if it differs: `data (a.yaml and b.yaml)`."""
    found = []
    for name in ("data", "single_cls"):
        values = {shown(group.values[name]): None for group in groups if group.values is not None}
        if len(values) > 1:
            found.append(f"{name.replace('_', ' ')} ({' and '.join(values)})")
    return found


def in_words(name: str, value: Any) -> str:
    """Format a setting for a label: `epochs 30`, `no amp`, `from yolov5n`; empty if nothing is to be said."""
    words = name.removeprefix(HYP).replace("_", " ")
    if isinstance(value, bool):
        default = settings_of(DistillOptions)[name].default if not name.startswith(HYP) else False
        return "" if value == default else words if value else f"no {words}"
    if name == "weights":
        return f"from {value}" if value else "from scratch"
    if value in ("", None) or value == []:
        return ""
    return f"{words} {shown(value)}"


def shown(value: Any) -> str:
    """Format a value as people would write it."""
    if isinstance(value, list | tuple):
        return " and ".join(map(shown, value)) if value else "-"
    if isinstance(value, float):
        return f"{value:g}"
    return "-" if value in ("", None) else str(value)


def _label(run: Run, values: Values | None, differing: Sequence[str]) -> str:
    if values is None:
        return run.folder.name
    label = "plain"
    if "teacher" in values:
        own = [f"teacher {name}" if name != OWN_AVERAGE else "its own average" for name in values["teacher"]]
        label = f"distilled: {values.get('distill_loss') or 'response'}, {' and '.join(own)}"
    details = [text for name in differing if name in values and (text := in_words(name, values[name]))]
    if len(details) <= _MOST_DETAILS + 1:  # one more is no longer than saying so
        return ", ".join((label, *details))
    # More would fill the picture. The folder says which run it is, and its row in runs.csv has the rest.
    rest = counted(len(details) - _MOST_DETAILS, "more difference")
    return ", ".join((f"{run.folder.name}: {label}", *details[:_MOST_DETAILS], rest))


def _counted(group: Sequence[Run]) -> str:
    if len(group) < 2:
        return ""
    seeds = {run.seed for run in group}
    return f" ({len(group)} {'seeds' if len(seeds) == len(group) and None not in seeds else 'runs'})"


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _by_name(name: str, value: Any) -> Any:
    """Return the value of a file option without the folder."""
    if isinstance(value, list | tuple):
        return [_by_name(name, entry) for entry in value]
    if not isinstance(value, str):
        return value
    if name in ("weights", "teacher"):
        return weights_name(value) if value else ""
    return PurePath(value.replace("\\", "/")).name if name in ("cfg", "teacher_cfg", "data") else value
