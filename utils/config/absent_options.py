"""Options that people know from elsewhere and that are not here: what to say of each."""

from __future__ import annotations

_NO_SERVICE = "is not supported: results stay in the run's folder"

# By name without the dashes in front; no word of these is near enough to an option to be meant for it.
ABSENT = {
    "adam": "does not exist, use --optimizer Adam",
    "artifact-alias": _NO_SERVICE,
    "bbox-interval": _NO_SERVICE,
    "bucket": _NO_SERVICE,
    "dnn": "is not needed: .onnx files are run by onnxruntime",
    "entity": "does not exist: for --logger wandb set WANDB_ENTITY",
    "int8": "is not supported: export in float32, or in float16 with --half",
    "keras": "is not supported: --include takes onnx, torchscript and openvino",
    "linear-lr": "does not exist: without --cos-lr the learning rate falls along a line",
    "local-rank": "is not supported and not needed: torchrun tells each process its number",
    "notest": "does not exist, use --noval",
    "per-tensor": "is not supported, leave it out",
    "quad": "is not supported, leave it out",
    "optimize": "is not supported, leave it out",
    "study": "is not supported, run test.py once for each --img",
    "topk-all": "does not exist, use --nms and --max-det",
    "topk-per-class": "does not exist, use --nms and --max-det",
    "update": "is not supported: public weights are read as they are",
    "upload-dataset": _NO_SERVICE,
    "workspace": "is not supported, leave it out",
    "visualize": "is not supported, leave it out",
}
