"""What train.py and train_distill.py do with their options: check the data, dry run, evolve or train."""

from __future__ import annotations

from pathlib import Path

from utils.batch import Batch
from utils.config.command import start_command
from utils.config.files import run_folder_to_come
from utils.config.options import TrainOptions
from utils.datasets.check import check_data
from utils.device import advice_on_memory
from utils.distributed import joined_ranks, processes_of_command
from utils.evaluation.evaluate import evaluate
from utils.losses.recipe import plain_recipe
from utils.reporting.console import Console
from utils.training import setup
from utils.training.evolve import evolve, is_evolution
from utils.training.rehearsal import Plan, rehearse
from utils.training.run import RecipeFor, TrainingRun
from utils.training.stop import StopSignals


def run_training(options: TrainOptions, recipe_for: RecipeFor = plain_recipe) -> Path:
    """Train as the options say, with the losses of their recipe; return the run's folder.

    A resumed run uses the options it was started with, so the run itself calls `recipe_for`. With `evolve`
    the evolution's folder is returned; with `check_data`, which only checks the dataset, and `dry_run`, which
    builds and tries everything, the dataset's YAML.
    """
    if options.check_data:
        console = Console()
        config = setup.dataset(options, console.info)
        return check_data(config, console.info, console.table, options.single_cls)
    with advice_on_memory(), joined_ranks(), StopSignals() as stop:
        if options.dry_run:
            try_out(TrainingRun(options, recipe_for, stop))
            return Path(options.data)
        if is_evolution(options):

            def train(generation: TrainOptions, how_to_go_on: str) -> None:
                TrainingRun(generation, recipe_for, stop, how_to_go_on).train()

            return evolve(options, train, Console())
        return TrainingRun(options, recipe_for, stop).execute()


def try_out(run: TrainingRun) -> None:
    """Try a few batches of a dry run; print what the run would take and where it would be saved.

    The run's networks are no longer in their initial state afterwards.
    """
    options, say = run.options, run.console.info
    is_scored_once = options.noval or options.evolve is not None
    plan = Plan(options.epochs, 1 if is_scored_once else options.epochs, len(run.val_loader))

    def score(batches: list[Batch]) -> None:
        evaluate(run.trainer.ema.model, batches, names=run.data.names)

    say(rehearse(run.trainer, run.train_loader, run.val_loader, score, plan))
    if options.evolve is None:
        folder = run_folder_to_come(Path(options.project), options.name, options.exist_ok)
        say(f"dry run: all is ready, nothing was written; a run would be in {folder}")
    else:
        say(
            f"dry run: all is ready, nothing was written; an evolution would train {options.evolve} such runs"
        )
    say(f"start it: {start_command(options, processes_of_command())}")
