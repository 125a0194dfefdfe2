"""Evaluation: `python -m benchmarks.evaluation --weights best.pt --data data/bccd.yaml`.

How much of test.py's loop is the network's own time, and what average precision takes for millions of
detections.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import device_of, medians, ms, parser, table
from models.checkpoint import build_model, read_checkpoint
from models.places import resolve_weights
from utils.batch import Batch
from utils.config.dataset import load_dataset_config
from utils.datasets.index import build_index
from utils.datasets.loader import eval_loader
from utils.evaluation.evaluate import EvaluationSettings, evaluate
from utils.evaluation.metrics import IOU_THRESHOLDS, average_precision_per_class
from utils.inference.predictor import Predictor, prepare_model


def share_of_network(weights: str, data: Path, split: str, size: int, rounds: int, device_name: str) -> None:
    """Time whole evaluations, and only the forward passes of the same batches."""
    device = device_of(device_name)
    model = prepare_model(build_model(read_checkpoint(resolve_weights(weights))), device)
    index = build_index(load_dataset_config(data), split)
    if model.nc != len(index.names):
        count = len(index.names)
        raise SystemExit(f"{weights} has {model.nc} classes, {data} {count}: give --weights trained on it")
    loader = eval_loader(index, image_size=size, batch_size=32, workers=2, stride=model.size_multiple)
    batches: list[Batch] = list(loader)
    settings = EvaluationSettings()
    predictor = Predictor(model, settings.nms_rules())

    @torch.no_grad()
    def bare() -> None:
        for batch in batches:
            predictor.forward(batch.to(device).to_float().images)

    words = ["--weights", weights, "--data", data, "--task", split, "--img", size, "--device", device_name]

    def script() -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "test.py", *map(str, words), "--project", folder]
            subprocess.run(command, check=True, capture_output=True)

    work = {
        "the network alone, up to its raw outputs": bare,
        "scored": lambda: evaluate(model, loader, names=index.names),
        "`test.py`, its start and its images included": script,
    }
    times = medians(work, rounds, device, warm=1)
    network, *others = times
    rows = [[f"{len(index)} images, {network}", ms(times[network]), ""]]
    rows += [[name, ms(times[name]), f"{times[network] / times[name]:.0%} in the network"] for name in others]
    table([f"{weights}, {size} px", "median", ""], rows)


def peak_kib() -> int:
    """Return the peak memory of this program; `getrusage` would include that of the process before exec."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def average_precision(detections: int) -> None:
    """Time average precision over `detections` random detections and print its peak memory."""
    rng = np.random.default_rng(0)
    classes = 80
    # Column by column: at once, the random numbers would take more memory than what is measured.
    hits = np.empty((detections, len(IOU_THRESHOLDS)), np.bool_)
    for column in range(len(IOU_THRESHOLDS)):
        hits[:, column] = rng.random(detections, np.float32) < 0.3
    confidence = rng.random(detections).astype(np.float32)
    found = rng.integers(0, classes, detections).astype(np.float32)
    true = rng.integers(0, classes, detections // 10)
    before = peak_kib()
    begun = time.perf_counter()
    average_precision_per_class(hits, confidence, found, true)
    seconds = time.perf_counter() - begun
    peak = peak_kib()
    grown, most = (f"{kib / 1024:,.0f} MiB" for kib in (peak - before, peak))
    header = ["average precision", "time", "memory beside its input", "peak of the process"]
    table(header, [[f"{detections:,} detections", ms(seconds), grown, most]])


def main() -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument("--weights", default="yolov5s.pt")
    options.add_argument("--data", default="data/bccd.yaml", type=Path)
    options.add_argument("--split", default="test")
    options.add_argument("--img", type=int, default=640)
    options.add_argument("--detections", type=int, default=5_000_000)
    options.add_argument("--precision-only", action="store_true", help="leave the network out")
    given = options.parse_args()
    if given.precision_only:
        average_precision(given.detections)
        return
    share_of_network(given.weights, given.data, given.split, given.img, given.rounds, given.device)
    # In a process of its own, as peak memory is per process.
    words = ["--precision-only", "--detections", str(given.detections)]
    subprocess.run([sys.executable, "-m", "benchmarks.evaluation", *words], check=True)


if __name__ == "__main__":
    main()
