"""Train a detector on labelled images."""

import sys

from utils.config.cli import run
from utils.config.options import TrainOptions


def main(options: TrainOptions) -> None:
    """Trains as the options say."""
    from utils.training.start import run_training  # after the options are known to be right

    run_training(options)


if __name__ == "__main__":
    sys.exit(run(TrainOptions, main, __doc__))
