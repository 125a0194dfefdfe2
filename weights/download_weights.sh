#!/bin/sh
# Fetches public weights into this folder: download_weights.sh yolov5n.pt yolov5s.pt ; --help tells more.
# PYTHON=python3.12 picks another Python than that of .venv.
exec sh "$(dirname -- "$0")/../data/scripts/project_python.sh" -m models.download "$@"
