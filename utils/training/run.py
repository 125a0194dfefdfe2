"""A training run from options to weights; its losses come from a recipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.checkpoint import Checkpoint, build_model, read_checkpoint
from models.modes import in_mode
from models.yolo import Model
from utils.batch import Batch, Progress, StudentOutput
from utils.config.command import after_training, resume_command
from utils.config.files import next_run_folder, write_text_atomically
from utils.config.hyperparameters import load_hyperparameters
from utils.config.options import TrainOptions, options_to_dict, yaml_text
from utils.datasets.loader import TrainLoader
from utils.device import DeadWorkerError, describe_device, select_device
from utils.distributed import (
    from_main,
    main_first,
    processes_of_command,
    rank,
    seed_everything,
    share_state,
    wait_for_all,
)
from utils.evaluation.best import Best
from utils.evaluation.evaluate import EvaluationResult, EvaluationSettings, evaluate
from utils.inference.preprocess import fitting_image_size
from utils.losses.recipe import EpochReport, Loss, LossContext, LossRecipe
from utils.reporting.console import Console, EpochBar, duration
from utils.reporting.loggers import check_loggers, open_loggers
from utils.training import setup, state
from utils.training.autoanchor import check_anchors
from utils.training.compiled import speed_up
from utils.training.ema import ModelEma
from utils.training.loop import BAR_FACTS, EpochHooks, Meters, Trainer
from utils.training.patience import stop_reason
from utils.training.plots import RunPlots
from utils.training.precision import settle_precision, teacher_dtype
from utils.training.records import RunRecords
from utils.training.resume import check_images, note_launch, resumed, with_absolute_paths
from utils.training.step import TrainingStep
from utils.training.stop import StopSignals, is_process_gone
from utils.training.table import row_of
from utils.training.weight_files import WeightFiles
from utils.words import counted

MEASURABLE = 0.2  # fraction of an epoch; less says little about the time left
RecipeFor = Callable[[Any], LossRecipe]  # takes the script's own options class


class TrainingRun:
    """The phases of a run, one method each: preparation, then epochs of training, validation and saving."""

    def __init__(
        self, options: TrainOptions, recipe_for: RecipeFor, stop: StopSignals, how_to_go_on: str = ""
    ) -> None:
        """Load and check everything; create the run's folder only once all of it is valid.

        With `dry_run` no folder is created. how_to_go_on: message after a signal, instead of how to resume.
        """
        self.console, self.stop, self.how_to_go_on = Console(), stop, how_to_go_on
        self.saved, self.folder, options = resumed(options)
        self.options = options
        check_loggers(options.logger)
        if self.saved is None:
            setup.check_yamls(options)  # report a mistyped name before downloading weights
        recipe = recipe_for(options)
        self.device = select_device(options.device)
        self.console.info(f"device {describe_device(self.device)}, torch {torch.__version__}")
        seed_everything(options.seed)
        self.hyp = load_hyperparameters(options.hyp) if self.saved is None else state.saved_hyp(self.saved)
        if self.saved is None:
            setup.find_weights(options)
        with main_first():  # the other ranks read its index from the cache
            self.data = setup.read_data(options, self.console.info)
        self._warn_of([*self.data.train.problems, *self.data.val.problems])
        self.data_digest = state.data_digest(self.data.train)
        model, head = self._network()
        self.start_epoch, self.best = 0, Best()
        self.class_scores = np.zeros(len(self.data.names))
        self.scoring = EvaluationSettings(single_cls=options.single_cls)
        (self.image_size,) = fitting_image_size([options.imgsz], model.size_multiple, self.console)
        setup.check_batches(options, self.data.train, self.image_size, model.size_multiple)
        self.train_loader, self.val_loader = setup.loaders(
            options, self.hyp, self.data, self.image_size, model.size_multiple
        )
        for note in self.train_loader.notes:
            self.console.info(note)
        self._fit_anchors(model)
        if head is not None:
            setup.take_over_head(model, head, self.console)
        self.model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.console.info(f"{self.model.summary(self.image_size)}")
        self.detection = setup.detection_loss(self.model, options, self.hyp, self.image_size)
        self.detection.to(self.device)
        share_state(self.model)
        self.ema = ModelEma(self.model, self.hyp.ema_decay, self.hyp.ema_tau)
        self.losses = self._losses(recipe)
        self.trainer = self._trainer()
        if not options.dry_run:
            self._open_folder()

    def _network(self) -> tuple[Model, Checkpoint | None]:
        """Return the initial network and the weights whose head it may take over, or the saved network."""
        options, head = self.options, None
        if self.saved is None:
            model, head = setup.build_network(options, self.hyp, self.data.names, self.console)
        else:
            model = state.saved_network(self.saved, self.data.names, options.data)
            check_images(self.saved, self.data_digest, options.data, self.console.warn)
        setup.freeze_layers(model, options.freeze)
        setup.synchronised_norms(model, options, self.device, self.console)
        return model, head

    def _warn_of(self, problems: Sequence[str]) -> None:
        for problem in problems:
            self.console.warn(problem)

    def _fit_anchors(self, model: Model) -> None:
        if self.saved is None and not self.options.noautoanchor:
            sizes, seed = self.data.train.box_sizes_px(self.image_size), self.options.seed
            self.console.info(check_anchors(model, sizes, self.hyp.anchor_t, self.console.warn, seed=seed))

    def _losses(self, recipe: LossRecipe) -> Sequence[Loss]:
        context = LossContext(
            model=self.model,
            ema=self.ema.model,
            is_new=self.saved is None,
            names=self.data.names,
            merged=self.data.merged,
            image_size=self.image_size,
            device=self.device,
            detection=self.detection,
            evaluate=self._evaluate,
            say=self.console.info,
            warn=self.console.warn,
        )
        return recipe(context)

    def _evaluate(self, model: Model, **extra: Any) -> EvaluationResult:
        names, settings = self.data.names, self.scoring
        return evaluate(
            model, self.val_loader, names=names, settings=settings, progress=self.console, **extra
        )

    def _trainer(self) -> Trainer:
        step = TrainingStep(self.model, self.losses).to(self.device)
        trainer = setup.build_trainer(step, self.ema, self.options, self.hyp, self.image_size, self.device)
        if self.saved is not None:
            run = state.run_state(self.saved)
            state.restore(self.saved, trainer)
            self.start_epoch, self.best = run.epoch, Best(run.best_fitness, run.best_epoch)
            self.class_scores = np.array(run.class_scores)
            self.saved = None  # free the second copy of all weights
        options, asked = self.options, self._from_losses("networks")
        dtype = teacher_dtype(options.amp, options.amp_dtype, self.device)
        settle_precision(trainer, asked, dtype, self.val_loader, self.console.warn)
        speed_up(trainer, options, self.image_size, len(self.train_loader), self.console)
        return trainer

    def _from_losses(self, hook: str) -> dict[str, Any]:
        """Merge the dicts that this hook returns, over all losses that have it."""
        return {name: entry for loss in self.losses for name, entry in getattr(loss, hook, dict)().items()}

    def _open_folder(self) -> None:
        options = self.options
        resuming = self.folder is not None
        if rank() == 0:
            self._make_files(resuming)
        self.folder = from_main(self.folder)
        assert self.folder is not None
        self.weights = self.folder / "weights"
        self.files = WeightFiles(self.weights, options, self.hyp)
        self.trainer.guard.folder = self.folder if self.folder.is_dir() else None  # on another machine
        enabled = not options.noplots and rank() == 0
        self.plots = RunPlots(self.folder, self.data.train, self.console.warn, enabled=enabled)

    def _make_files(self, resuming: bool) -> None:
        """Create the run's folder and the files written before the first epoch; on rank 0 only."""
        options = self.options
        self.folder = self.folder or next_run_folder(Path(options.project), options.name, options.exist_ok)
        weights = state.open_weights(self.folder)
        # Also when resuming: the run may have been given more epochs.
        write_text_atomically(self.folder / "opt.yaml", yaml_text(options_to_dict(options)))
        if not resuming:
            earlier = state.set_weights_aside(weights)
            if earlier is not None:
                self.console.info(f"the weights of an earlier run are now in {earlier}")
            write_text_atomically(self.folder / "hyp.yaml", yaml_text(self.hyp.to_dict()))
            note_launch(self.folder)
        loggers = open_loggers(
            options.logger, self.folder, self.console.warn, self.start_epoch, resuming=resuming
        )
        loggers.settings({**options_to_dict(options), "hyp": self.hyp.to_dict()})
        self.records = RunRecords(self.folder, self.trainer.step, self.start_epoch, loggers)
        self.records.references(self._from_losses("references"), anew=not resuming)

    def execute(self) -> Path:
        """Run all epochs and evaluate the resulting weights; return the run's folder."""
        begun, options, picture = time.monotonic(), self.options, self.data.val.paths[0]
        done = self.train()
        assert self.folder is not None
        best = self._final_evaluation()  # always: a run killed after its last epoch may lack the plots
        if done:
            took = duration(time.monotonic() - begun)
            self.console.info(f"{counted(done, 'epoch')} in {took}; results in {self.folder}")
        self.console.info(after_training(options, best, picture, setup.scoring_batch(options)))
        return self.folder

    def train(self) -> int:
        """Run the remaining epochs; return their number."""
        assert self.folder is not None
        options = self.options
        over = stop_reason(options, self.start_epoch, self.best)
        if over:
            self.console.info(over)
            if rank() == 0:
                self.files.save_if_none(self.trainer.ema.model, self.start_epoch - 1, self.best)
            return 0
        unlabelled = self.data.train.unlabelled_count
        self.console.info(
            f"{counted(len(self.data.train), 'image')} for training, "
            + (f"{unlabelled} of them unlabelled, " if unlabelled else "")
            + f"{len(self.data.val)} for validation; saving to {self.folder}"
        )
        steps = len(self.train_loader)
        end = Progress(options.epochs * steps, options.epochs - 1, steps, options.epochs)
        if (warmed := end.warmed(self.hyp.warmup_epochs)) < 1:
            self.console.info(
                f"the run ends at {warmed:.0%} of the learning rate's warm-up: take more --epochs, or "
                "'warmup_epochs: 0' in --hyp"
            )
        self.plots.labels()
        resume = f"go on with: {resume_command(type(options), self.folder, processes_of_command())}"
        # A resumed epoch may be partly done.
        self.begun = time.monotonic(), self.start_epoch + self.trainer.done / len(self.train_loader)
        with self.stop.noted(self.how_to_go_on or resume):
            for epoch in range(self.start_epoch, options.epochs):
                stop = self._epoch(epoch)
                if stop:
                    break
        for loss in self.losses:
            if hasattr(loss, "finish"):
                loss.finish()
        return epoch + 1 - self.start_epoch

    def _epoch(self, epoch: int) -> bool:
        """Train, validate and save; return whether the run stops early."""
        options = self.options
        last = epoch + 1 == options.epochs
        if options.image_weights:
            self._weigh_images()
        means = self._train(epoch)
        scored, seconds, begun = not options.noval or last, self.trainer.seconds, time.monotonic()
        result = self._validate(epoch) if scored else None
        scoring = time.monotonic() - begun if scored else None
        self.trainer.begin_epoch()
        if result is not None:
            self.best = self.best.after(epoch, result.fitness)
            self.class_scores = result.ap_by_class()
        stop = self.best.is_given_up(options.patience, options.noval, epoch + 1)
        if rank() == 0:
            self.records.add(epoch, row_of(epoch, means, result, self.trainer.optimizer), seconds, scoring)
        self._review(EpochReport(means, result.map50_95 if result else None))
        if not options.nosave or last or stop:
            self._save(epoch, result)
        self._tell(epoch, result, 0 if stop else options.epochs - epoch - 1)
        if stop and not last:
            self.console.info(
                f"stopping early: no better score since epoch {self.best.epoch + 1}; "
                f"change with --patience (now {options.patience})"
            )
        return stop

    def _tell(self, epoch: int, result: EvaluationResult | None, epochs_left: int) -> None:
        """Print an epoch's scores and the time left at the current pace."""
        since, first = self.begun
        seconds = (time.monotonic() - since) / max(epoch + 1 - first, 0.01) * epochs_left
        parts = [str(result)] if result is not None else []
        parts += [f"about {duration(seconds)} left"] if epochs_left and epoch + 1 - first > MEASURABLE else []
        if parts:
            self.console.info(f"  {'; '.join(parts)}")

    def _review(self, report: EpochReport) -> None:
        for loss in self.losses:
            if hasattr(loss, "review"):
                self._warn_of(list(loss.review(report)))

    def _train(self, epoch: int) -> dict[str, float]:
        step, place = self.trainer.step, f"{epoch + 1}/{self.options.epochs}"
        if self.trainer.done >= len(self.train_loader):
            self.console.info(f"epoch {place} is trained already, and is scored now")

        def show(loader: TrainLoader, done: int) -> EpochBar:
            columns = [*step.names, *step.gauges, *BAR_FACTS]
            to_come = len(loader) * (self.options.epochs - epoch - 1)
            return self.console.epoch(loader, len(loader), place, columns, done, to_come)

        hooks = EpochHooks(self.plots.training_batch, self._after_step, self.console.warn)
        with self._state_kept(epoch):
            means = self.trainer.run_epoch(self.train_loader, epoch, self.options.epochs, show, hooks)
            # Batch norm statistics differ by rank; all score the EMA, a teacher with `--teacher ema`.
            share_state(self.trainer.ema.model, parameters=False)
            return means

    def _after_step(self, progress: Progress) -> None:
        every, stop = self.options.save_every_steps, self.stop.agreed()
        if stop or (every and (progress.step + 1) % every == 0):
            self._save_state(progress.epoch, self.trainer.meters.over_ranks())
        if stop:
            wait_for_all()  # torchrun ends all ranks as soon as one has exited
            self.stop.raise_if_wanted()

    @contextmanager
    def _state_kept(self, epoch: int) -> Iterator[None]:
        """Save the state if another process (loader worker, rank) dies and no step is half done."""
        try:
            yield
        except (DeadWorkerError, RuntimeError) as error:
            if is_process_gone(error) and self.trainer.between_steps:
                self._save_state(epoch)
            raise

    def _validate(self, epoch: int) -> EvaluationResult:
        """Evaluate the EMA; if a signal asks to stop, save the state before stopping.

        Ranks need not agree to stop: they only communicate at the end, where rank 0 notices that others are
        gone.
        """

        def stop_between_batches(_batch: Batch, _detections: list[torch.Tensor]) -> None:
            if self.stop.wanted is not None:
                self._save_state(epoch)
            self.stop.raise_if_wanted()

        with self._state_kept(epoch):
            return self._evaluate(
                self.trainer.ema.model, loss=self._validation_loss, observers=[stop_between_batches]
            )

    def _validation_loss(self, batch: Batch, output: StudentOutput) -> dict[str, torch.Tensor]:
        with in_mode(self.detection, training=False):  # no all-reduce: ranks may have unequal numbers
            return self.detection(batch, output)  # type: ignore[no-any-return]

    def _save(self, epoch: int, result: EvaluationResult | None) -> None:
        """Save the weights, then the state: if killed in between, `--resume` writes the weights again."""
        if rank() == 0:
            fitness = None if result is None else result.fitness
            self.files.save(self.trainer.ema.model, epoch, self.best, fitness)
        self._save_state(epoch + 1)

    def _save_state(self, epoch: int, meters: Meters | None = None) -> None:
        """Save what `--resume` needs to continue with an epoch (0-based), from its next batch."""
        if rank() > 0:
            return
        options = self.options
        run = state.RunState(
            epoch=epoch,
            best_fitness=self.best.fitness,
            best_epoch=self.best.epoch,
            class_scores=self.class_scores.tolist(),
            kind=type(options).__name__,
            options=with_absolute_paths(options),
            network=dict(self.model.yaml),
            names=list(self.data.names),
            hyp=self.hyp.to_dict(),
            data=self.data_digest,
        )
        state.save_state(self.weights / state.STATE_NAME, run, self.trainer, meters)

    def _weigh_images(self) -> None:
        """Sample images with rare or badly scored classes more often."""
        self.train_loader.set_image_weights(self.data.train.class_weights() * (1 - self.class_scores) ** 2)

    def _final_evaluation(self) -> Path:
        """Evaluate the best weights as saved on disk, with plots and a table; return their path."""
        wait_for_all()
        best = self.files.final
        # The run's folder may exist only on the machine of rank 0.
        checkpoint = from_main(read_checkpoint(best) if rank() == 0 else None)
        assert checkpoint is not None
        model = build_model(checkpoint).to(self.device)
        others = self._from_losses("networks")
        result = self._evaluate(model, observers=self.plots.observers(model, others, self.scoring))
        self.console.info(f"{best} on the validation split:")
        self.console.table(*result.table())
        self.plots.finish(result)
        if rank() == 0:
            self.records.loggers.close()
        return best
