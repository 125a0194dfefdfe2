"""How throughput goes with the number of GPUs: `python -m benchmarks.scale --device 0`.

No run of several GPUs: pieces that one machine can measure (a step, the loader, the bytes of the gradients),
put together with bandwidths that are assumed. The table marks which is which; give your own by options.

A step of N GPUs takes max(computing + meetings + what of the exchange is not hidden, making a batch). The
exchange is a ring all-reduce: each GPU sends and receives 2 (N - 1) / N times the bytes, over the slowest
link, with a latency for each of its 2 (N - 1) turns. With CUDA graphs it follows the backward pass; without,
`--within-backward`, it begins when the first gradients are there and hides behind that pass. Meetings are the
small sums that a step waits for, the normalisers of the losses and the buffers of the network: trees,
2 log2(N) turns each.

Source of the estimate: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of
workstations, 2009, section 3.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.loader import SAMPLES, samples
from benchmarks.measure import device_of, medians, parser, table
from benchmarks.step import Bench
from utils.config.dataset import load_dataset_config
from utils.config.hyperparameters import Hyperparameters
from utils.cuda_graphs.capture import WARM_CALLS
from utils.datasets.index import build_index
from utils.datasets.loader import AugmentSettings, train_loader
from utils.training.replayed import capture_places, replay_frozen

# Small all-reduces per step: normalisers of the detection loss, and buffers; `response` adds its normaliser.
SMALL_ALLREDUCES, SMALL_ALLREDUCES_DISTILLED = 2, 3
BACKWARD_SHARE = 2 / 3  # of a plain step: two matrix products in the backward pass for each forward one


@dataclass(frozen=True)
class Pieces:
    """The measured performance of one GPU and one core.

    step_s: seconds of a step without communication. overlap_s: of the backward pass that hides communication.
    gradient_bytes: of the student, float32. batch: images per step and GPU. samples_s: training samples per
    second and core. small_allreduces: those that a step waits for.
    """

    step_s: float
    overlap_s: float
    gradient_bytes: int
    batch: int
    samples_s: float
    small_allreduces: int


@dataclass(frozen=True)
class Machine:
    """The assumed properties of a machine.

    gpus: per machine. cores: for loading, per machine. inside_gb_s, between_gb_s: bandwidth between the GPUs
    of a machine and between machines, 10^9 bytes per second. latency_us: of one step of an all-reduce.
    """

    gpus: int
    cores: int
    inside_gb_s: float
    between_gb_s: float
    latency_us: float


@dataclass(frozen=True)
class Estimate:
    """For a number of GPUs: images per second, scaling efficiency relative to one GPU, and the bottleneck."""

    gpus: int
    images_s: float
    efficiency: float
    limit: str


def exchange_s(pieces: Pieces, machine: Machine, gpus: int) -> float:
    """Return the seconds of a ring all-reduce of the gradients."""
    if gpus == 1:
        return 0.0
    bandwidth = (
        machine.inside_gb_s if gpus <= machine.gpus else min(machine.inside_gb_s, machine.between_gb_s)
    )
    turns = 2 * (gpus - 1)
    return turns / gpus * pieces.gradient_bytes / (bandwidth * 1e9) + turns * machine.latency_us * 1e-6


def estimate(pieces: Pieces, machine: Machine, counts: list[int]) -> Iterator[Estimate]:
    """Yield the estimate for each number of GPUs; every machine adds its own cores."""
    for gpus in counts:
        machines = -(-gpus // machine.gpus)
        exposed = max(exchange_s(pieces, machine, gpus) - pieces.overlap_s, 0.0)
        small = pieces.small_allreduces * 2 * math.ceil(math.log2(gpus)) * machine.latency_us * 1e-6
        computing = pieces.step_s + small + exposed
        loading = gpus * pieces.batch / (pieces.samples_s * machine.cores * machines)
        seconds = max(computing, loading)
        limit = (
            "loader" if loading > computing else "exchange" if exposed > 0.05 * pieces.step_s else "network"
        )
        yield Estimate(gpus, gpus * pieces.batch / seconds, pieces.step_s / seconds, limit)


def measured(given: argparse.Namespace, device: torch.device) -> tuple[Pieces, Pieces]:
    """Measure the pieces of a plain and of a distilled run (`response`)."""
    bench = Bench(given.student, given.teacher, given.img, given.batch, device)
    plain, distilled = bench.trainer(), bench.trainer(distill_loss="response")
    if given.within_backward:
        if device.type == "cuda":
            replay_frozen(distilled, capture_places(distilled), print)
    else:
        plain, distilled = bench.with_cuda_graphs(plain), bench.with_cuda_graphs(distilled)
    work = {"plain": bench.step(plain), "distilled": bench.step(distilled)}
    times = medians(work, given.rounds, device, WARM_CALLS + 2)
    size = sum(4 * p.numel() for p in plain.step.model.parameters() if p.requires_grad)
    index, hyp = build_index(load_dataset_config(given.data), "train"), Hyperparameters()
    augment = AugmentSettings.of(hyp)
    loader = train_loader(
        index, image_size=given.img, batch_size=SAMPLES, augment=augment, workers=0, seed=0, cache=given.cache
    )
    cpu = torch.device("cpu")
    batch_s = medians({"": samples(loader)}, max(given.rounds, 5), cpu, clock=time.thread_time)[""]
    rate = SAMPLES / batch_s
    return pieces_of(given, (times["plain"], times["distilled"]), size, rate)


def options_given() -> argparse.Namespace:
    """Parse the command line."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--student", default="yolov5s")
    options.add_argument("--teacher", default="yolov5m")
    options.add_argument("--img", type=int, default=640)
    options.add_argument("--batch", type=int, default=16, help="images of one GPU")
    options.add_argument("--data", default="data/bccd.yaml", type=Path)
    options.add_argument("--cache", choices=["ram"], help="images in memory instead of from files")
    options.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    options.add_argument("--gpus-in-machine", type=int, default=8, help="assumed")
    options.add_argument("--cores", type=int, default=os.cpu_count(), help="of each machine, assumed")
    options.add_argument("--inside", type=float, default=20.0, help="10^9 bytes/s between its GPUs, assumed")
    options.add_argument("--between", type=float, default=3.0, help="the same between machines, assumed")
    options.add_argument("--latency", type=float, default=20.0, help="microseconds a turn, assumed")
    options.add_argument(
        "--step-ms", type=float, nargs=2, help="plain and distilled step, in place of timing"
    )
    options.add_argument(
        "--within-backward", action="store_true", help="without CUDA graphs: gradients overlap with that pass"
    )
    options.add_argument(
        "--samples", type=float, help="training samples a second and core, in place of timing"
    )
    return options.parse_args()


def main() -> None:
    given = options_given()
    pieces = measured(given, device_of(given.device)) if given.step_ms is None else pieces_from_options(given)
    machine = Machine(given.gpus_in_machine, given.cores, given.inside, given.between, given.latency)
    origin = "measured here" if given.step_ms is None else "as given"
    rows = [
        *(
            [
                f"{kind} step",
                f"{1000 * one.step_s:.1f} ms",
                origin,
            ]
            for kind, one in zip(("plain", "distilled"), pieces, strict=True)
        ),
        ["gradients", f"{pieces[0].gradient_bytes / 1e6:.1f} MB", "counted"],
        ["training samples a second and core", f"{pieces[0].samples_s:.0f}", origin],
        [
            "backward pass that hides the exchange",
            f"{1000 * pieces[0].overlap_s:.1f} ms",
            "assumed: 2/3 of a step" if given.within_backward else "the exchange follows it",
        ],
        [
            "small sums that a step waits for",
            f"{SMALL_ALLREDUCES}, distilled {SMALL_ALLREDUCES_DISTILLED}",
            "counted",
        ],
        ["cores of a machine", str(machine.cores), "assumed"],
        ["between GPUs of a machine", f"{machine.inside_gb_s:g} GB/s", "assumed"],
        ["between machines", f"{machine.between_gb_s:g} GB/s", "assumed"],
        ["latency of a turn", f"{machine.latency_us:g} us", "assumed"],
    ]
    table([f"{given.student} under {given.teacher}, {given.img} px, batch {given.batch}", "", ""], rows)
    both = [list(estimate(one, machine, given.gpus)) for one in pieces]
    table(
        ["GPUs", "plain", "of N times one", "stops at", "distilled", "of N times one", "stops at"],
        [
            [
                str(a.gpus),
                *(w for e in (a, b) for w in (f"{e.images_s:,.0f}/s", f"{e.efficiency:.0%}", e.limit)),
            ]
            for a, b in zip(*both, strict=True)
        ],
    )


def pieces_from_options(given: argparse.Namespace) -> tuple[Pieces, Pieces]:
    """Return the pieces given as options, with the gradient size of the student."""
    from models.yolo import Model

    size = sum(4 * parameter.numel() for parameter in Model(f"models/{given.student}.yaml").parameters())
    if given.samples is None:
        raise SystemExit("--step-ms needs --samples too")
    return pieces_of(given, [ms / 1000 for ms in given.step_ms], size, given.samples)


def pieces_of(
    given: argparse.Namespace, steps: Sequence[float], size: int, samples_s: float
) -> tuple[Pieces, Pieces]:
    """Return the pieces of a plain and of a distilled run from the seconds of their steps."""
    overlap = BACKWARD_SHARE * steps[0] if given.within_backward else 0.0
    return (
        Pieces(steps[0], overlap, size, given.batch, samples_s, SMALL_ALLREDUCES),
        Pieces(steps[1], overlap, size, given.batch, samples_s, SMALL_ALLREDUCES_DISTILLED),
    )


if __name__ == "__main__":
    main()
