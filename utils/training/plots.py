"""Plots that a run saves in its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from models.yolo import Model
from utils.batch import Batch, Progress
from utils.datasets.index import DatasetIndex
from utils.errors import UserError
from utils.evaluation.disagreement import DisagreementPlots
from utils.evaluation.evaluate import EvaluationResult, EvaluationSettings, Observer
from utils.evaluation.plots import BatchPlots, save_score_plots
from utils.reporting.image_plots import plot_batch
from utils.reporting.results import RESULTS_NAME

TRAINING_BATCHES = 3


class RunPlots:
    """Plots of training batches, label statistics, validation batches and curves; none unless `enabled`.

    Weights and scores matter more: if a plot cannot be written, the run warns and continues without plots.
    """

    def __init__(
        self, folder: Path, index: DatasetIndex, warn: Callable[[str], None], *, enabled: bool
    ) -> None:
        """`index` is that of the training split; `warn` gets a message if a plot cannot be written."""
        self.folder, self.index, self.enabled, self._warn = folder, index, enabled, warn
        self.disagreements: list[DisagreementPlots] = []

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        """Catch a failure to write a plot, warn and disable further plots."""
        try:
            yield
        except UserError as error:
            self._warn(f"{error}; the run goes on without plots")
            self.enabled = False

    def labels(self) -> None:
        """Save labels.jpg: number, position and size of the labels."""
        if self.enabled:
            from utils.reporting.plots import plot_labels  # matplotlib takes half a second to import

            labels, unlabelled = self.index.all_labels(), self.index.unlabelled_count
            with self._attempt():
                plot_labels(self.folder / "labels.jpg", labels, self.index.names, unlabelled)

    def training_batch(self, batch: Batch, progress: Progress) -> None:
        """Save train_batch0.jpg to train_batch2.jpg: the first batches as they come from the loader."""
        if self.enabled and progress.step < TRAINING_BATCHES:
            with self._attempt():
                plot_batch(
                    self.folder / f"train_batch{progress.step}.jpg",
                    batch.images,
                    batch.targets,
                    batch.paths,
                    self.index.names,
                    labelled=batch.labelled,
                )

    def observers(
        self, model: Model, others: Mapping[str, Model], settings: EvaluationSettings
    ) -> list[Observer]:
        """Return the observers of the final evaluation: val_batch0_labels.jpg, val_batch0_pred.jpg and so on.

        others: networks to run on the same images, with outputs in the same classes, by display name; one
        that lacks some has the others in `known_classes`, and is left out if that is empty. The images on
        which they and the model disagree most go into disagreement.jpg and objectness.jpg, numbered from the
        second network on.
        """
        if not self.enabled:
            return []
        self.disagreements = [
            DisagreementPlots(model, other, ("student", name), self.index.names, settings, known)
            for name, other in others.items()
            if (known := getattr(other, "known_classes", None)) != ()
        ]
        batches = BatchPlots(self.folder, self.index.names)

        def draw_batch(batch: Batch, detections: list[Tensor]) -> None:
            if self.enabled:
                with self._attempt():
                    batches(batch, detections)

        return [draw_batch, *self.disagreements]

    def finish(self, result: EvaluationResult) -> None:
        """Save the score curves, the confusion matrix, the curves of the whole run and the disagreements."""
        if self.enabled:
            from utils.reporting.plots import plot_results  # matplotlib takes half a second to import

            with self._attempt():
                save_score_plots(self.folder, result)
                plot_results(self.folder / RESULTS_NAME)
                for number, disagreement in enumerate(self.disagreements, 1):
                    disagreement.save(self.folder, "" if number == 1 else str(number))
