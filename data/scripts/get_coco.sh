#!/bin/sh
# Fetches COCO 2017 (20 GB; with --splits val 1 GB) and makes its labels; --help tells more.
# PYTHON=python3.12 picks another Python than that of .venv.
set -eu
folder=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$folder/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
cd "$folder"
exec "$PYTHON" -m utils.datasets.download data/coco.yaml "$@"
