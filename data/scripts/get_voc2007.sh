#!/bin/sh
# Fetches PASCAL VOC 2007 (0.9 GB) to where data/voc2007.yaml wants it; --help tells more.
# PYTHON=python3.12 picks another Python than that of .venv.
set -eu
folder=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$folder/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
cd "$folder"
exec "$PYTHON" -m utils.datasets.download data/voc2007.yaml "$@"
