"""Options known from other YOLOv5 implementations that are missing here, with a message for each."""

from __future__ import annotations

_NO_SERVICE = "is not supported: results stay in the run's folder"
_NO_AUTOBATCH = "there is no AutoBatch, give a number; train.py --dry-run says what memory it takes"
_NO_STUDY = "is not supported, run test.py once for each --img"
_FORMATS = "is not supported: --include takes onnx, torchscript and openvino"

# By name without leading dashes; none of these is close enough to an existing option to be a typo of it.
ABSENT = {
    "adam": "does not exist, use --optimizer Adam",
    "artifact-alias": _NO_SERVICE,
    "bbox-interval": _NO_SERVICE,
    "bucket": _NO_SERVICE,
    "entity": "does not exist: for --logger wandb set WANDB_ENTITY",
    "evolve-population": "is not supported: --evolve goes on from the generations in its folder",
    "int8": "is not supported: export in float32, or in float16 with --half",
    "keras": _FORMATS,
    "global-rank": "is not supported and not needed: torchrun tells each process its number",
    "inplace": "is not supported, leave it out",
    "linear-lr": "does not exist: without --cos-lr the learning rate falls along a line",
    "local-rank": "is not supported and not needed: torchrun tells each process its number",
    "log-artifacts": _NO_SERVICE,
    "log-imgs": _NO_SERVICE,
    "mlmodel": _FORMATS,
    "ndjson-console": _NO_SERVICE,
    "ndjson-file": _NO_SERVICE,
    "notest": "does not exist, train.py has --noval",
    "per-tensor": "is not supported, leave it out",
    "quad": "is not supported, leave it out",
    "optimize": "is not supported, leave it out",
    "resume-evolve": "is not needed: the same --evolve command goes on with what is there",
    "save-format": "is not supported: --save-txt writes YOLO's lines, --save-csv a table",
    "save-hybrid": "is not supported: --save-txt writes what was found alone",
    "study": _NO_STUDY,
    "topk-all": "does not exist, use --nms and --max-det",
    "topk-per-class": "does not exist, use --nms and --max-det",
    "update": "is not supported: public weights are read as they are",
    "upload-dataset": _NO_SERVICE,
    "workspace": "is not supported, leave it out",
    "visualize": "is not supported, leave it out",
}

# Values that options accept there, by (option name without leading dashes, value).
ABSENT_VALUES = {
    ("batch-size", "-1"): _NO_AUTOBATCH,
    ("task", "study"): _NO_STUDY,
    ("include", "engine"): "is not supported: TensorRT itself builds an engine from the .onnx file",
    **{
        ("include", format): _FORMATS
        for format in ("coreml", "saved_model", "pb", "tflite", "edgetpu", "tfjs", "paddle")
    },
}

# Options of other scripts here, and of export.py in other implementations.
ABSENT_FROM_EXPORT = {
    "train": "is not supported: what is exported is for detection",
    "verbose": "is not supported, leave it out",
}
