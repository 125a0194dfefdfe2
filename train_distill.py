"""Train a detector on labelled images and on the outputs of a frozen teacher."""

import sys

from utils.config.cli import run
from utils.config.options import DistillOptions


def main(options: DistillOptions) -> None:
    """Trains as the options say, with the distillation loss added."""
    from utils.distillation.recipe import distillation_recipe  # after the options are known to be right
    from utils.training.start import run_training

    run_training(options, distillation_recipe)


if __name__ == "__main__":
    sys.exit(run(DistillOptions, main, __doc__))
