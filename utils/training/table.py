"""The rows of results.csv: an epoch's values, under the column names that YOLOv5 users know."""

from __future__ import annotations

from torch.optim import Optimizer

from utils.evaluation.evaluate import EvaluationResult
from utils.losses.detection import DetectionLoss
from utils.reporting.results import SCORES
from utils.training.step import TrainingStep


def columns_of(step: TrainingStep) -> list[str]:
    """Return the columns of a run, known before the first step."""
    return [
        "epoch",
        *(f"train/{_column(name)}" for name in (*step.names, *step.gauges)),
        *SCORES,
        *(f"val/{_column(name)}" for name in DetectionLoss.names),
        "x/lr0",
        "x/lr1",
        "x/lr2",
    ]


def row_of(
    epoch: int, means: dict[str, float], result: EvaluationResult | None, optimizer: Optimizer
) -> dict[str, float]:
    """Return the values of an epoch, without validation columns if it was not validated."""
    row: dict[str, float] = {"epoch": epoch}
    row.update({f"train/{_column(name)}": value for name, value in means.items()})
    if result is not None:
        scores = (result.precision, result.recall, result.map50, result.map50_95)
        row.update(dict(zip(SCORES, scores, strict=True)))
        row.update({f"val/{_column(name)}": value for name, value in result.losses.items()})
    row.update({f"x/lr{index}": group["lr"] for index, group in enumerate(optimizer.param_groups)})
    return row


def _column(name: str) -> str:
    """Return the public column of a term: `box` becomes `box_loss`, gauges keep their name."""
    return name if name.endswith("_ratio") else f"{name}_loss"
