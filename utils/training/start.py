"""What train.py and train_distill.py do with their options: look, rehearse, evolve or train."""

from __future__ import annotations

from pathlib import Path

from utils.config.dataset import load_dataset_config
from utils.config.options import TrainOptions
from utils.datasets.check import check_data
from utils.device import advice_on_memory
from utils.distributed import joined_ranks
from utils.losses.recipe import plain_recipe
from utils.reporting.console import Console
from utils.training.evolve import evolve, is_evolution
from utils.training.run import RecipeFor, TrainingRun
from utils.training.stop import StopSignals


def run_training(options: TrainOptions, recipe_for: RecipeFor = plain_recipe) -> Path:
    """Trains as the options say, with the losses of their recipe; gives the run's folder.

    A run that goes on has the options it was started with, which is why the recipe is asked for there.
    With `evolve` it gives the folder of the evolution; with `check_data` it only looks at the dataset, with
    `dry_run` it builds and tries everything, and gives the dataset's YAML.
    """
    if options.check_data:
        console = Console()
        return check_data(load_dataset_config(options.data, options.data_dir), console.info, console.table)
    with advice_on_memory(), joined_ranks(), StopSignals() as stop:
        if options.dry_run:
            TrainingRun(options, recipe_for, stop).rehearse()
            return Path(options.data)
        if is_evolution(options):

            def train(generation: TrainOptions, how_to_go_on: str) -> None:
                TrainingRun(generation, recipe_for, stop, how_to_go_on).train()

            return evolve(options, train, Console())
        return TrainingRun(options, recipe_for, stop).execute()
