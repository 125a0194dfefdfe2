#!/bin/sh
# Fetches COCO 2017 (20 GB; with --splits val 1 GB) and makes its labels; --help tells more.
# PYTHON=python3.12 picks another Python than that of .venv.
exec sh "$(dirname -- "$0")/project_python.sh" -m utils.datasets.download data/coco.yaml "$@"
