"""Memory: `python -m benchmarks.memory`.

What a distilled step takes beside a plain one, and what the index of a dataset of up to a million
images takes, here and in the processes that make batches. The images need not exist for that: their index
is made up. What it takes to come by an index is measured with thousands of tiny ones.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import device_of, medians, ms, parser, table
from benchmarks.step import PROGRESS, SAMPLED, Bench
from utils.batch import Progress
from utils.device import select_device

KINDS = ("plain", "teacher", "distilled")
STEPS: dict[str, tuple[dict[str, object], Progress]] = {
    "`response`": ({"distill_loss": "response"}, PROGRESS),
    "`response`, where gradients are compared": ({"distill_loss": "response"}, SAMPLED),
    "`response`, features by cwd": ({"distill_loss": "response", "feature_loss": "cwd"}, PROGRESS),
    "`l2`": ({"distill_loss": "l2"}, PROGRESS),
    "`boxes`": ({"distill_loss": "boxes"}, PROGRESS),
}
LABELS = 7  # per generated image, COCO's mean


def own_mib() -> float:
    """Return the current proportional set size of this process: private and its part of shared memory."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as stream:
        found = {line.split(":")[0]: line.split()[1] for line in stream if line.startswith("Pss:")}
    return int(found["Pss"]) / 1024


def peak_mib(device: torch.device) -> float:
    """Return the peak memory of this process."""
    if device.type == "cuda":
        # Reserved, as the memory that a CUDA graph keeps between replays does not count as allocated.
        return torch.cuda.max_memory_reserved(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def of_steps(given: argparse.Namespace) -> None:
    """Print the memory before the first step of one kind and the peak, as JSON."""
    from utils.cuda_graphs.capture import WARM_CALLS

    device = select_device(given.device)
    bench = Bench(given.student, given.teacher, given.img, given.batch, device)
    trainer = bench.trainer(**({} if given.kind == "plain" else {"distill_loss": "response"}))
    bench.with_cuda_graphs(trainer)
    work = bench.teacher_alone(trainer) if given.kind == "teacher" else bench.step(trainer)
    before = peak_mib(device)
    for _ in range(WARM_CALLS + 3):
        work()
    print(json.dumps({"before": before, "peak": peak_mib(device)}))


def compare_steps(given: argparse.Namespace) -> None:
    """Compare the peak memory of a plain and of a distilled run, each in a process of its own."""
    found = {}
    words = ["--device", given.device, "--student", given.student, "--teacher", given.teacher]
    words += ["--img", str(given.img), "--batch", str(given.batch)]
    for kind in KINDS:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", "--kind", kind, *words],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    plain, distilled = found["plain"]["peak"], found["distilled"]["peak"]
    # The teacher may add its weights and one forward pass.
    allowed = plain + (found["teacher"]["peak"] - found["plain"]["before"])
    rows = [
        ["plain", f"{plain:,.0f} MiB"],
        ["plain, with the teacher's weights and one forward of it", f"{allowed:,.0f} MiB"],
        ["distilled", f"{distilled:,.0f} MiB"],
    ]
    table([f"{given.student} under {given.teacher}, {given.img} px, batch {given.batch}", "peak"], rows)


def of_index(pictures: int, workers: int) -> list[str]:
    """Create a synthetic index and order its images as for training; returns a row of the table."""
    from utils.datasets.index import DatasetIndex
    from utils.datasets.loader import AugmentSettings, train_loader
    from utils.datasets.packed import PackedRows, PackedTexts

    rng = np.random.default_rng(0)
    begun, before = time.perf_counter(), own_mib()
    counts = rng.integers(1, 14, pictures)
    labels = PackedRows(rng.random((int(counts.sum()), 5), np.float32), counts)
    paths = PackedTexts(f"/data/images/train/{number:012d}.jpg" for number in range(pictures))
    sizes, known = np.full((pictures, 2), 640, np.int64), np.ones(pictures, bool)
    index = DatasetIndex(paths, labels, sizes, known, [], ["a"])
    made, held = time.perf_counter() - begun, own_mib() - before
    loader = train_loader(
        index, image_size=640, batch_size=16, augment=AugmentSettings(mosaic=1.0), workers=0, seed=0
    )
    # With a warm-up round: the first one also pays for allocating memory.
    started = medians({"": lambda: next(iter(loader._order))}, 3, torch.device("cpu"), warm=1)[""]
    beside = _of_workers(loader, workers)
    each = held * 2**20 / pictures
    return [f"{pictures:,}", f"{held:,.0f} MiB", f"{each:,.0f}", ms(started), f"{beside:,.1f} MiB", ms(made)]


def _of_workers(loader: object, workers: int) -> float:
    """Return the mean private memory in MiB of a forked process that reads through the whole index."""
    total = 0.0
    for _ in range(workers):
        reading, writing = os.pipe()
        if os.fork() == 0:
            before = _private_mib()
            dataset = loader.dataset  # type: ignore[attr-defined]
            for number in range(0, len(dataset.index), 7):
                _ = len(dataset.index.paths[number]), dataset.index.labels[number].shape
            os.write(writing, str(_private_mib() - before).encode())
            os._exit(0)
        os.close(writing)
        total += float(os.read(reading, 100).decode())
        os.close(reading)
        os.wait()
    return total / max(workers, 1)


def _private_mib() -> float:
    with open("/proc/self/smaps_rollup", encoding="ascii") as stream:
        return sum(int(line.split()[1]) for line in stream if line.startswith("Private_Dirty")) / 1024


def make_files(folder: Path, pictures: int) -> Path:
    """Create a dataset of tiny images with labels; returns the path of its YAML."""
    _, encoded = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))
    rows = "".join(f"0 0.5 0.5 0.{number}1 0.{number}2\n" for number in range(1, LABELS + 1))
    for kind in ("images", "labels"):
        (folder / kind / "train").mkdir(parents=True)
    for number in range(pictures):
        (folder / f"images/train/{number:012d}.png").write_bytes(encoded.tobytes())
        (folder / f"labels/train/{number:012d}.txt").write_text(rows, encoding="ascii")
    settings = folder / "data.yaml"
    settings.write_text(
        f"path: {folder}\ntrain: images/train\nval: images/train\nnames: [a]\n", encoding="utf-8"
    )
    return settings


def of_start(settings: Path) -> None:
    """Print the time and the peak memory of indexing a dataset, as JSON."""
    from utils.config.dataset import load_dataset_config
    from utils.datasets.index import build_index

    config = load_dataset_config(settings)
    before, begun = peak_mib(torch.device("cpu")), time.perf_counter()
    build_index(config, "train", cache_dir=settings.parent / "cache", progress=False)
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "mib": peak_mib(torch.device("cpu")) - before}))


def step_peaks(
    bench: Bench, kinds: Mapping[str, tuple[dict[str, object], Progress]]
) -> dict[str, tuple[float, float]]:
    """Return the peak memory of the tensors of each kind of step, and its limit, in MiB.

    Measured exactly, on the CPU, relative to the memory between steps. The limit is what a plain step and
    one forward pass of the teacher take.
    """
    plain = bench.step(bench.trainer())
    plain()  # allocates the momentum buffers
    most = tensor_peak_mib(plain)
    found = {}
    for name, (options, progress) in kinds.items():
        trainer = bench.trainer(**options)  # type: ignore[arg-type]
        bench.step(trainer)()
        allowed = most + tensor_peak_mib(bench.teacher_alone(trainer))
        found[name] = tensor_peak_mib(bench.step(trainer, progress)), allowed
    return found


def tensor_peak_mib(work: Callable[[], object]) -> float:
    """Return the peak memory in MiB of the tensors allocated by a function on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes: list[int] = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=0)) / 2**20


def compare_starts(pictures: int) -> list[list[str]]:
    """Measure the first start with a dataset and the next one, each in a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        settings = make_files(Path(folder), pictures)
        for title in ("first start", "next start"):
            words = [sys.executable, "-m", "benchmarks.memory", "--start", str(settings)]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            each = found["mib"] * 2**20 / pictures
            time_each = f"{found['seconds'] / pictures * 1e6:,.0f} us"
            rows.append([f"{pictures:,}, {title}", f"{found['mib']:,.0f} MiB", f"{each:,.0f}", time_each])
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--student", default="yolov5s")
    options.add_argument("--teacher", default="yolov5m")
    options.add_argument("--img", type=int, default=320)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--pictures", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    options.add_argument(
        "--files", type=int, nargs="*", default=[10_000, 40_000], help="tiny images to index"
    )
    options.add_argument("--start", type=Path, help="measure indexing this dataset alone, for JSON")
    options.add_argument("--kind", choices=KINDS, help="measure this kind of step alone, for JSON")
    given = options.parse_args()
    if given.kind:
        of_steps(given)
        return
    if given.start:
        of_start(given.start)
        return
    device_of(given.device)
    compare_steps(given)
    if given.device == "cpu":
        bench = Bench(given.student, given.teacher, given.img, given.batch, torch.device("cpu"))
        peaks = step_peaks(bench, STEPS)
        table(
            ["a step's tensors", "at their most", "plain and teacher's forward"],
            [[name, *(f"{value:,.0f} MiB" for value in pair)] for name, pair in peaks.items()],
        )
    rows = [of_index(count, workers=2) for count in given.pictures]
    header = ["images", "index", "bytes each", "start of an epoch", "a worker's own", "made up in"]
    table(header, rows)
    starts = [row for count in given.files for row in compare_starts(count)]
    table(["images of 8 px", "peak beside the rest", "bytes each", "time each"], starts)


if __name__ == "__main__":
    main()
