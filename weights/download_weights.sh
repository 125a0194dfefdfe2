#!/bin/sh
# Fetches public weights into this folder: download_weights.sh yolov5n.pt yolov5s.pt ; --help tells more.
# PYTHON=python3.12 picks another Python than that of .venv.
set -eu
folder=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$folder/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
cd "$folder"
exec "$PYTHON" -m models.download "$@"
