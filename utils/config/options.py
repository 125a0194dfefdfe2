"""The options of the scripts, each declared once: name, type, default, range, unit and help.

Parsing, `--help`, the README's tables, `opt.yaml` and all checks are derived from the fields. Contradictory
values are detected when an options object is created, before any work starts.
"""

from utils.config.options_base import Options, options_from_dict, options_to_dict
from utils.config.options_compare import CompareOptions
from utils.config.options_distill import OWN_AVERAGE, PRESETS, DistillOptions, Preset
from utils.config.options_export import ExportOptions
from utils.config.options_inference import DetectOptions, TestOptions
from utils.config.options_train import CHANGEABLE_ON_RESUME, TrainOptions
from utils.config.schema import yaml_text

__all__ = [
    "CHANGEABLE_ON_RESUME",
    "OWN_AVERAGE",
    "PRESETS",
    "CompareOptions",
    "DetectOptions",
    "DistillOptions",
    "ExportOptions",
    "Options",
    "Preset",
    "TestOptions",
    "TrainOptions",
    "options_from_dict",
    "options_to_dict",
    "yaml_text",
]
