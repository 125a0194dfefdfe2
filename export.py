"""Write a network into files that other programs run, and compare them with PyTorch."""

import sys

from utils.config.cli import run
from utils.config.options import ExportOptions


def main(options: ExportOptions) -> None:
    """Exports as the options say."""
    from utils.export.run import run_export  # after the options are known to be right

    run_export(options)


if __name__ == "__main__":
    sys.exit(run(ExportOptions, main, __doc__))
