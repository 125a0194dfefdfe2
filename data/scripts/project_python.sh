#!/bin/sh
# Runs the project's Python in the project's folder, with the words that are given to it.
# PYTHON=python3.12 picks another Python than that of .venv.
set -eu
cd -- "$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$PWD/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
exec "$PYTHON" "$@"
