"""Compare training runs, or draw where a student and its teacher disagree."""

import sys

from utils.config.cli import run
from utils.config.options import CompareOptions


def main(options: CompareOptions) -> None:
    """Compares what the options name."""
    from utils.comparison.run import run_compare  # after the options are known to be right
    from utils.device import advice_on_memory

    with advice_on_memory():
        run_compare(options)


if __name__ == "__main__":
    sys.exit(run(CompareOptions, main, __doc__))
