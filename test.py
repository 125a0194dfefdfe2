"""Score a network on a split of a labelled dataset."""

import sys

from utils.config.cli import run
from utils.config.options import TestOptions


def main(options: TestOptions) -> None:
    """Scores as the options say."""
    from utils.evaluation.run import run_test  # after the options are known to be right

    run_test(options)


if __name__ == "__main__":
    sys.exit(run(TestOptions, main, __doc__))
