"""Find objects in images, videos and streams, and draw boxes around them."""

import sys

from utils.config.cli import run
from utils.config.options import DetectOptions


def main(options: DetectOptions) -> None:
    """Detects as the options say."""
    from utils.inference.run import run_detect  # after the options are known to be right

    run_detect(options)


if __name__ == "__main__":
    sys.exit(run(DetectOptions, main, __doc__))
