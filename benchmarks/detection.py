"""Detection in a folder: `python -m benchmarks.detection --weights yolov5s.pt --source data/images`.

detect.py, which reads, finds, draws and writes, against the network alone on the same images.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.measure import device_of, medians, parser, table
from models.checkpoint import build_model, read_checkpoint
from models.places import resolve_weights
from utils.boxes import NmsRules
from utils.config.options import DetectOptions
from utils.datasets.images import is_image, read_image
from utils.inference.detector import Detector
from utils.inference.frames import Frame
from utils.inference.pipeline import in_groups
from utils.inference.predictor import Predictor, prepare_model
from utils.inference.run import run_detect


def many_images(source: Path, count: int, folder: Path) -> list[Path]:
    """Create a folder with `count` images by repeating those of the source, as links if possible."""
    found = sorted(path for path in source.rglob("*") if is_image(path))
    if not found:
        raise SystemExit(f"no images in {source}")
    folder.mkdir()
    made = [folder / f"{n:05d}{found[n % len(found)].suffix}" for n in range(count)]
    for number, path in enumerate(made):
        original = found[number % len(found)].resolve()
        os.symlink(original, path) if hasattr(os, "symlink") else shutil.copy(original, path)
    return made


class Bare:
    """The network alone, up to its raw outputs, on preprocessed images in the batches of detect.py."""

    def __init__(self, predictor: Predictor, pictures: Sequence[Path], size: int) -> None:
        self.model, self.predictor = predictor.model, predictor
        detector = Detector(self.predictor, self.model.names, (size, size))
        prepared = [detector.prepare(Frame(read_image(path), str(path))).pixels for path in pictures]
        groups = in_groups(prepared, lambda pixels: pixels.shape, detector.batch)
        self.batches = [torch.cat(group) if len(group) > 1 else group[0] for group in groups]

    @torch.no_grad()
    def __call__(self) -> None:
        """Run all images once."""
        for pixels in self.batches:
            self.predictor.forward(pixels.to(self.predictor.device).float().div_(255))


def main() -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument("--weights", default="yolov5s.pt")
    options.add_argument("--source", type=Path, default=Path("data/images"))
    options.add_argument("--pictures", type=int, default=100)
    options.add_argument("--img", type=int, default=640)
    options.add_argument("--half", action="store_true", help="float16, on a GPU")
    given = options.parse_args()
    device = device_of(given.device)
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / part for part in ("once", "twice")]
        pictures = [
            many_images(given.source, given.pictures * (turn + 1), folder)
            for turn, folder in enumerate(folders)
        ]

        def detect(folder: Path) -> Callable[[], object]:
            options = DetectOptions(
                weights=(given.weights,), source=str(folder), imgsz=(given.img,), device=given.device,
                project=Path(name) / "out", half=given.half,
            )  # fmt: skip

            def run() -> None:
                with contextlib.redirect_stdout(io.StringIO()):
                    run_detect(options)

            return run

        model = build_model(read_checkpoint(resolve_weights(given.weights)))
        model = prepare_model(model, device, given.half)
        plain = Predictor(model, NmsRules(), half=given.half)
        work: dict[str, Callable[[], object]] = {
            "network": Bare(plain, pictures[0], given.img),
            "once": detect(folders[0]),
            "twice": detect(folders[1]),
        }
        if device.type == "cuda":
            replayed = Predictor(model, NmsRules(), half=given.half, warn=print)
            work["replayed"] = Bare(replayed, pictures[0], given.img)
        times = medians(work, given.rounds, device, warm=1)
    # The startup, including loading the weights, is in both and cancels out.
    steady = times["twice"] - times["once"]
    rates = {"the network alone": times["network"], "detect.py": steady}
    if "replayed" in times:
        rates["the network alone, as a CUDA graph"] = times["replayed"]
    rows = [[name, f"{given.pictures / seconds:.1f} images/s"] for name, seconds in rates.items()]
    rows.append(["ratio", f"{times['network'] / steady:.0%}"])
    table([f"{given.weights}, {given.img} px", "median"], rows)


if __name__ == "__main__":
    main()
