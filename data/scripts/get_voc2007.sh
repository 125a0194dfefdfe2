#!/bin/sh
# Fetches PASCAL VOC 2007 (0.9 GB) to where data/voc2007.yaml wants it; --help tells more.
# PYTHON=python3.12 picks another Python than that of .venv.
exec sh "$(dirname -- "$0")/project_python.sh" -m utils.datasets.download data/voc2007.yaml "$@"
