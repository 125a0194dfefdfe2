"""Hyperparameters that change from generation to generation: which, how far, and from whom they come.

Pure functions of what they are given: the same rows, number and seed give the same values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from utils.config.hyperparameters import Hyperparameters

PARENTS = 5  # so many of the best may have offspring
CHANCE = 0.8  # of each value to change
SIGMA = 0.2  # of the normal distribution of a change's logarithm, for a gain of 1
DIGITS = 5  # significant, of a changed value
_STREAM = 3  # apart from the streams of the pictures


@dataclass(frozen=True)
class Gene:
    """How far a value may move: `gain` times SIGMA in a generation, and from `low` to `high` in all."""

    gain: float
    low: float
    high: float


# What YOLOv5 lets evolve, with its gains and limits. Left out: what it keeps still too (gain 0: fl_gamma,
# perspective, fliplr), what has no effect here (iou_t, copy_paste), and `anchors`, another number of which
# is another network that start weights do not fit.
GENES: Mapping[str, Gene] = {
    "lr0": Gene(1, 1e-5, 0.1),
    "lrf": Gene(1, 0.01, 1.0),
    "momentum": Gene(0.3, 0.6, 0.98),
    "weight_decay": Gene(1, 0.0, 0.001),
    "warmup_epochs": Gene(1, 0.0, 5.0),
    "warmup_momentum": Gene(1, 0.0, 0.95),
    "warmup_bias_lr": Gene(1, 0.0, 0.2),
    "box": Gene(1, 0.02, 0.2),
    "cls": Gene(1, 0.2, 4.0),
    "cls_pw": Gene(1, 0.5, 2.0),
    "obj": Gene(1, 0.2, 4.0),
    "obj_pw": Gene(1, 0.5, 2.0),
    "anchor_t": Gene(1, 2.0, 8.0),
    "hsv_h": Gene(1, 0.0, 0.1),
    "hsv_s": Gene(1, 0.0, 0.9),
    "hsv_v": Gene(1, 0.0, 0.9),
    "degrees": Gene(1, 0.0, 45.0),
    "translate": Gene(1, 0.0, 0.9),
    "scale": Gene(1, 0.0, 0.9),
    "shear": Gene(1, 0.0, 10.0),
    "flipud": Gene(1, 0.0, 1.0),
    "mosaic": Gene(1, 0.0, 1.0),
    "mixup": Gene(1, 0.0, 1.0),
}


@dataclass(frozen=True)
class Ancestor:
    """A generation that is over: its hyperparameters, and how good they were (0 or more)."""

    hyp: Hyperparameters
    fitness: float


def offspring(
    start: Hyperparameters, ancestors: Sequence[Ancestor], generation: int, seed: int
) -> Hyperparameters:
    """The hyperparameters of a generation (0-based); those of generation 0 are `start` itself.

    ancestors: generations that are over, in the order of their numbers. Those with fitness 0 have no
    offspring; as long as there are no others, `start` has.
    """
    if generation == 0:
        return start
    rng = np.random.default_rng((seed, generation, _STREAM))
    parent = choose_parent(ancestors, rng)
    return mutated(start if parent is None else parent.hyp, start, rng)


def choose_parent(ancestors: Sequence[Ancestor], rng: np.random.Generator) -> Ancestor | None:
    """One of the best few, the fitter the likelier; None where none has any fitness."""
    able = [ancestor for ancestor in ancestors if ancestor.fitness > 0]
    best = sorted(able, key=lambda ancestor: -ancestor.fitness)[:PARENTS]
    if not best:
        return None
    fitness = np.array([ancestor.fitness for ancestor in best])
    # By what each is ahead of the last: scores of the best lie close together. The last keeps a chance.
    lead = fitness - fitness[-1]
    weights = lead + (0.1 * lead[0] or 1.0)
    return best[int(rng.choice(len(best), p=weights / weights.sum()))]


def mutated(parent: Hyperparameters, start: Hyperparameters, rng: np.random.Generator) -> Hyperparameters:
    """Another set of values near the parent's; at least one of them differs.

    Values are multiplied, so that small ones move by little and one of 0, something that is turned off,
    stays. Where `start` lies beyond a gene's limits they reach to it.
    """
    values, first = parent.to_dict(), start.to_dict()
    genes = {name: gene for name, gene in GENES.items() if values[name] > 0}
    assert genes, "lr0 is above 0"
    changed = dict(values)
    while changed == values:
        for name, gene in genes.items():
            factor = np.exp(rng.normal(0.0, gene.gain * SIGMA)) if rng.random() < CHANCE else 1.0
            low, high = min(gene.low, first[name]), max(gene.high, first[name])
            wanted = float(f"{min(max(values[name] * factor, low), high):.{DIGITS}g}")
            changed[name] = values[name] if factor == 1.0 else min(max(wanted, low), high)
    return Hyperparameters(**changed)
