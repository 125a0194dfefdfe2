"""Mutation of hyperparameters between generations: which ones, by how much, and from which parent.

Pure functions: the same ancestors, generation number and seed give the same values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from utils.config.hyperparameters import Hyperparameters

PARENTS = 5  # how many of the best may have offspring
CHANCE = 0.8  # probability that a value changes
SIGMA = 0.2  # standard deviation of the logarithm of a change, for a gain of 1
DIGITS = 5  # significant digits of a changed value
_STREAM = 3  # random stream, distinct from those of the images


@dataclass(frozen=True)
class Gene:
    """How far a value may move: `gain` times SIGMA per generation, and between `low` and `high` overall."""

    gain: float
    low: float
    high: float


# What YOLOv5 evolves, with its gains and limits. Left out: what it keeps fixed as well (gain 0: fl_gamma,
# perspective, fliplr), what has no effect here (iou_t, copy_paste), and `anchors`: another number of them
# makes another network, which initial weights do not fit.
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
    """A finished generation: its hyperparameters and its fitness (0 or more)."""

    hyp: Hyperparameters
    fitness: float


def offspring(
    start: Hyperparameters, ancestors: Sequence[Ancestor], generation: int, seed: int
) -> Hyperparameters:
    """Return the hyperparameters of a generation (0-based); generation 0 is `start` itself.

    ancestors: finished generations, sorted by number. Those with fitness 0 have no offspring; as long as
    there are no others, `start` is the parent.
    """
    if generation == 0:
        return start
    rng = np.random.default_rng((seed, generation, _STREAM))
    parent = choose_parent(ancestors, rng)
    return mutated(start if parent is None else parent.hyp, start, rng)


def choose_parent(ancestors: Sequence[Ancestor], rng: np.random.Generator) -> Ancestor | None:
    """Choose one of the best few, fitter ones more likely; None if no fitness is above 0."""
    able = [ancestor for ancestor in ancestors if ancestor.fitness > 0]
    best = sorted(able, key=lambda ancestor: -ancestor.fitness)[:PARENTS]
    if not best:
        return None
    fitness = np.array([ancestor.fitness for ancestor in best])
    # Weighted by the lead over the last, as the best scores lie close together. The last keeps a chance.
    lead = fitness - fitness[-1]
    weights = lead + (0.1 * lead[0] or 1.0)
    return best[int(rng.choice(len(best), p=weights / weights.sum()))]


def mutated(parent: Hyperparameters, start: Hyperparameters, rng: np.random.Generator) -> Hyperparameters:
    """Return values near the parent's, at least one of which differs.

    Values are multiplied, so that small ones change little and a 0, i.e. something disabled, stays 0. If a
    value of `start` is beyond a gene's limits, they extend to it.
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
