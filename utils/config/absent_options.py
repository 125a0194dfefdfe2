"""Options that people know from elsewhere and that are not here: what to say of each."""

from __future__ import annotations

_NO_SERVICE = "is not supported: results stay in the run's folder"

# By name without the dashes in front; no word of these is near enough to an option to be meant for it.
ABSENT = {
    "adam": "does not exist, use --optimizer Adam",
    "artifact-alias": _NO_SERVICE,
    "bbox-interval": _NO_SERVICE,
    "bucket": _NO_SERVICE,
    "dnn": "is not supported: networks run in PyTorch alone",
    "entity": "does not exist: for --logger wandb set WANDB_ENTITY",
    "linear-lr": "does not exist: without --cos-lr the learning rate falls along a line",
    "local-rank": "is not supported and not needed: torchrun tells each process its number",
    "notest": "does not exist, use --noval",
    "quad": "is not supported, leave it out",
    "study": "is not supported, run test.py once for each --img",
    "update": "is not supported: public weights are read as they are",
    "upload-dataset": _NO_SERVICE,
    "visualize": "is not supported, leave it out",
}
