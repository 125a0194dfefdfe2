"""Matching of a network's classes to those of a dataset or of another network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.ensemble import Network
from models.names import ClassMap
from utils.errors import UserError
from utils.inference.exported import ExportedNetwork, has_own_names
from utils.reporting.console import Console
from utils.words import counted, listed

_LISTED = 6  # pairs of names in a warning


@dataclass(frozen=True)
class WantedClasses:
    """The classes that a network is to predict.

    whose: their origin, for messages. otherwise: what a user can do if the network does not know them.
    """

    names: Sequence[str]
    whose: str
    otherwise: str = ""


def fit_as_one(
    network: Network | ExportedNetwork, classes_wanted: WantedClasses, weights: Path | str, console: Console
) -> None:
    """Leave a network only those of its classes that are wanted, by name, to be counted as one class.

    The others would be false detections. With no name in common all of them count, as in the original YOLOv5.
    """
    own, wanted = list(network.names), classes_wanted.names
    classes = ClassMap.by_name(own, wanted)
    if len(own) < 2 or not has_own_names(own) or not classes.ignored:
        return
    rest = counted(len(classes.ignored), "class")
    if not classes.teacher:
        console.warn(f"{weights} and {classes_wanted.whose} share no class by name: all {rest} count")
        return
    kept = [own[number] for number in classes.teacher]
    network.keep_classes(classes.teacher, kept)
    console.info(f"{weights}: counted as one: {listed(kept)}; its other {rest} left out")


def fit_classes(
    network: Network | ExportedNetwork, classes_wanted: WantedClasses, weights: Path | str, console: Console
) -> None:
    """Make a network predict the wanted classes, matched by name if it knows all of them.

    Its other classes are dropped. If it lacks a name but has as many classes, they are matched by index, as
    in the original YOLOv5, and a warning lists those whose names differ. Raises UserError, listing both, if
    the numbers of classes differ.
    """
    own, wanted, whose = list(network.names), classes_wanted.names, classes_wanted.whose
    classes, named = ClassMap.by_name(own, wanted), has_own_names(own)
    if named and not classes.unknown and not classes.is_identity:
        network.keep_classes(classes.teacher, wanted)
        rest = f"; its other {counted(len(classes.ignored), 'class')} left out"
        console.info(
            f"{weights}: classes are matched by name, {classes.pairs(own, wanted)}"
            + (rest if classes.ignored else "")
        )
        return
    if len(own) != len(wanted):
        raise UserError(
            f"knows {listed(own)}, {whose} has {listed(wanted)}",
            weights,
            f"take weights that know all of these by name{classes_wanted.otherwise}",
        )
    known = set(zip(classes.student, classes.teacher, strict=True))
    differing = [(own[n], wanted[n]) for n in range(len(own)) if (n, n) not in known]
    if differing:
        pairs = ", ".join(f"'{a}' / '{b}'" for a, b in differing[:_LISTED])
        console.warn(f"classes are called differently in {weights} and {whose}: {pairs}")
