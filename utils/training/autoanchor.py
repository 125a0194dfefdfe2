"""AutoAnchor: fit anchors to the data if the given ones fit badly.

Shapes: M boxes, A anchors over all levels.
"""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import torch

from models.yolo import Model

Array = npt.NDArray[np.float64]
GOOD_RECALL = 0.98
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
    from scipy.cluster.vq import kmeans  # takes half a second to import, and few runs need it

    rng = np.random.default_rng(seed)
    usable = sizes[(sizes >= 2).any(1)]
    if len(usable) > MAX_BOXES:
        usable = usable[rng.choice(len(usable), MAX_BOXES, replace=False)]
    spread = usable.std(0)
    start = None
    if len(usable) > count and (spread > 0).all():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an empty cluster: handled below
            means, _ = kmeans(usable / spread, count, iter=30, rng=rng)
        start = means * spread if len(means) == count else None
    if start is None:  # boxes too few or too uniform for k-means: start around their mean size
        start = np.sort(rng.uniform(0.5, 1.5, (count, 2)) * usable.mean(0), 0)
    best = _refined(start, usable, limit, generations, rng)
    return best[np.argsort(best.prod(1))]


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


def check_anchors(model: Model, sizes: Array, limit: float, *, seed: int = 0) -> str:
    """Replace the model's anchors if too few boxes fit them; return a line that says what was done.

    sizes: (M, 2) label widths and heights in px at the training size.
    """
    if not (sizes >= 2).any():
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
    if new_recall <= recall:
        return f"{line}: kept, k-means found none better ({new_recall:.4f})"
    shaped = torch.from_numpy(fitted).view(head.anchors.shape)
    # Both the levels and the sorted anchors go from fine to coarse.
    head.anchors.copy_(shaped.to(head.anchors) / strides.to(head.anchors))
    model.yaml["anchors"] = [[round(float(x), 2) for x in level.flatten()] for level in shaped]
    return f"{line}: replaced by k-means anchors with recall {new_recall:.4f}"
