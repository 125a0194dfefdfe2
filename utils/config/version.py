"""The version of this software and of its environment."""

from __future__ import annotations

import platform

VERSION = "0.1.0"


def version_text() -> str:
    """Return the text of `--version`: this software, torch and Python, and the devices torch can use."""
    import torch  # takes a second, and only this function needs it

    cards = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    devices = ", ".join([*cards, f"CPU ({torch.get_num_threads()} threads)"])
    system = f"{platform.system()} {platform.machine()}"
    return (
        f"yolov5-distillation {VERSION}\n"
        f"torch {torch.__version__}, Python {platform.python_version()}, {system}\n"
        f"devices: {devices}"
    )
