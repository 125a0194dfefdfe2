"""AutoAnchor: fit anchors to the data if the given ones fit badly.

Shapes: M boxes, A anchors over all levels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from models.yolo import Model

Array = npt.NDArray[np.float64]
GOOD_RECALL = 0.98
POOR_RECALL = 0.5  # below it, most boxes train nothing
MAX_BOXES = 10_000  # size of the random sample that the search uses


def best_possible_recall(sizes: Array, anchors: Array, limit: float) -> tuple[float, float]:
    """Return the share of boxes that some anchor fits, and the mean number of fitting anchors per box.

    sizes: (M, 2) and anchors: (A, 2), widths and heights in px; an anchor fits if width and height each
    differ by a factor below `limit`.
    """
    fit = _closeness(sizes, anchors)
    good = fit > 1 / limit
    return float(good.any(1).mean()), float(good.sum(1).mean())


def _closeness(sizes: Array, anchors: Array) -> Array:
    """Return (M, A): the smaller of the width and height ratios, each taken as at most 1."""
    ratio = sizes[:, None] / anchors[None]
    return np.asarray(np.minimum(ratio, 1 / ratio).min(2))


def fit_anchors(sizes: Array, count: int, limit: float, *, seed: int = 0, generations: int = 1000) -> Array:
    """Fit `count` anchors (count, 2) in px, sorted by area: k-means on whitened sizes, then random search.

    The search mutates all anchors at once and keeps what raises the mean closeness of each box to its best
    anchor, counted only where that anchor fits. Boxes with both sides under 2 px are ignored.
    """
    rng = np.random.default_rng(seed)
    usable = sizes[(sizes >= 2).any(1)]
    if len(usable) > MAX_BOXES:
        usable = usable[rng.choice(len(usable), MAX_BOXES, replace=False)]
    best = _refined(_start(usable, count, rng), usable, limit, generations, rng)
    return best[np.argsort(best.prod(1))]


def _start(sizes: Array, count: int, rng: np.random.Generator) -> Array:
    """Return `count` anchors (count, 2), each near some sizes (M, 2): the search improves only what fits."""
    from scipy.cluster.vq import kmeans  # takes half a second to import, and few runs need it

    distinct, spread = np.unique(sizes, axis=0), sizes.std(0)
    if len(distinct) <= count:
        means: Array = distinct
    else:
        spread[spread == 0] = 1.0  # one side is the same everywhere
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an empty cluster: handled below
            centres, _ = kmeans(sizes / spread, count, iter=30, rng=rng)
        means = np.asarray(centres * spread, np.float64)
        if len(means) == count:
            return means
    spare = np.arange(count - len(means)) % len(means)
    return np.concatenate([means, means[spare] * rng.uniform(0.8, 1.25, (len(spare), 2))])


def _refined(anchors: Array, sizes: Array, limit: float, generations: int, rng: np.random.Generator) -> Array:
    def fitness(candidate: Array) -> float:
        best = _closeness(sizes, candidate).max(1)
        return float((best * (best > 1 / limit)).mean())

    score = fitness(anchors)
    for _ in range(generations):
        changed = rng.random(anchors.shape) < 0.9
        factors = 1 + changed * rng.random() * rng.normal(size=anchors.shape) * 0.1
        candidate = np.maximum(anchors * factors.clip(0.3, 3.0), 2.0)
        new = fitness(candidate)
        if new > score:
            anchors, score = candidate, new
    return anchors


def check_anchors(
    model: Model,
    sizes_px: npt.NDArray[np.floating],
    limit: float,
    warn: Callable[[str], None],
    *,
    seed: int = 0,
) -> str:
    """Replace the model's anchors if too few boxes fit them; return a line that says what was done.

    sizes_px: (M, 2) of the labels, at the training size. warn: told if most boxes fit none.
    """
    sizes = sizes_px.astype(np.float64)
    if not len(sizes):
        return "anchors: no labels to check them against"
    advice = "train with a larger --img, or raise anchor_t in the file of --hyp"
    if not (sizes >= 2).any():
        warn(f"every box is under 2 px, too small for any anchor: {advice}")
        return "anchors: kept, every box is under 2 px"
    head = model.head
    strides = head.stride.view(-1, 1, 1)
    current = (head.anchors.cpu() * strides.cpu()).reshape(-1, 2).double().numpy()
    recall, fitting = best_possible_recall(sizes, current, limit)
    line = f"anchors: {fitting:.2f} a target, best possible recall {recall:.4f}"
    if recall >= GOOD_RECALL:
        return f"{line}: kept"
    fitted = fit_anchors(sizes, len(current), limit, seed=seed)
    new_recall, _ = best_possible_recall(sizes, fitted, limit)
    if (most := max(recall, new_recall)) < POOR_RECALL:
        warn(f"no anchor fits {1 - most:.0%} of the boxes, from which nothing is learnt: {advice}")
    if new_recall <= recall:
        return f"{line}: kept, k-means found none better ({new_recall:.4f})"
    shaped = torch.from_numpy(fitted).view(head.anchors.shape)
    # Both the levels and the sorted anchors go from fine to coarse.
    head.anchors.copy_(shaped.to(head.anchors) / strides.to(head.anchors))
    model.yaml["anchors"] = [[round(float(x), 2) for x in level.flatten()] for level in shaped]
    return f"{line}: replaced by k-means anchors with recall {new_recall:.4f}"
