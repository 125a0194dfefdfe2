"""The pictures that a run leaves in its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from models.yolo import Model
from utils.batch import Batch, Progress
from utils.datasets.index import DatasetIndex
from utils.errors import UserError
from utils.evaluation.disagreement import DisagreementPictures
from utils.evaluation.evaluate import EvaluationResult, EvaluationSettings, Observer
from utils.evaluation.pictures import BatchPictures, save_score_pictures
from utils.reporting.pictures import plot_batch
from utils.reporting.results import RESULTS_NAME

TRAINING_BATCHES = 3


class RunPictures:
    """Training batches, label statistics, validation batches, curves; nothing when not `enabled`.

    Weights and scores matter more: where a picture cannot be written the run warns and goes on without.
    """

    def __init__(
        self, folder: Path, index: DatasetIndex, warn: Callable[[str], None], *, enabled: bool
    ) -> None:
        """`index` is the training split's; `warn` gets a sentence where a picture cannot be written."""
        self.folder, self.index, self.enabled, self._warn = folder, index, enabled, warn
        self.disagreements: list[DisagreementPictures] = []

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        """Within it a picture may fail to be written; further ones are then left out."""
        try:
            yield
        except UserError as error:
            self._warn(f"{error}; the run goes on without pictures")
            self.enabled = False

    def labels(self) -> None:
        """labels.jpg: how many, where and how large the labels are."""
        if self.enabled:
            from utils.reporting.plots import plot_labels  # matplotlib takes half a second to import

            labels, unlabelled = self.index.all_labels(), self.index.unlabelled_count
            with self._attempt():
                plot_labels(self.folder / "labels.jpg", labels, self.index.names, unlabelled)

    def training_batch(self, batch: Batch, progress: Progress) -> None:
        """train_batch0.jpg to train_batch2.jpg: what the network gets to see."""
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
        """What draws in the final evaluation: val_batch0_labels.jpg and val_batch0_pred.jpg, and so on.

        others: networks that answer to the same pictures in the same classes, by what to call them. Where
        they and the model disagree most goes into disagreement.jpg and objectness.jpg, with a number for
        the second and each further one.
        """
        if not self.enabled:
            return []
        self.disagreements = [
            DisagreementPictures(model, other, ("student", name), self.index.names, settings)
            for name, other in others.items()
        ]
        batches = BatchPictures(self.folder, self.index.names)

        def draw_batch(batch: Batch, detections: list[Tensor]) -> None:
            if self.enabled:
                with self._attempt():
                    batches(batch, detections)

        return [draw_batch, *self.disagreements]

    def finish(self, result: EvaluationResult) -> None:
        """The curves of scores and of the whole run, and the confusion matrix."""
        if self.enabled:
            from utils.reporting.plots import plot_results  # matplotlib takes half a second to import

            with self._attempt():
                save_score_pictures(self.folder, result)
                plot_results(self.folder / RESULTS_NAME)
                for number, disagreement in enumerate(self.disagreements, 1):
                    disagreement.save(self.folder, "" if number == 1 else str(number))
