"""A training step, plain and distilled: `python -m benchmarks.step --student yolov5s --teacher yolov5m`.

The floor of a distilled step is a plain step and the teacher's forward pass. The plain step is compared with
the same step done as it mostly is: weights in torch's own order, optimizer, clipping and average
as loops over the parameters, and the loss read in every step for the progress bar.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import clock_of, device_of, medians, ms, parser, table
from models.checkpoint import save_checkpoint
from models.yolo import Model
from utils.batch import Batch, Progress
from utils.config.hyperparameters import Hyperparameters
from utils.config.options import DistillOptions, TrainOptions
from utils.distillation.distiller import Distiller
from utils.distillation.recipe import distillation_recipe
from utils.losses.recipe import Loss, LossContext
from utils.training import setup
from utils.training.compiled import Compiler, compile_step
from utils.training.ema import ModelEma
from utils.training.loop import Trainer
from utils.training.precision import cpu_computes_bf16, teacher_dtype
from utils.training.replayed import replay_step, replays_student
from utils.training.step import TrainingStep

PRESETS: dict[str, dict[str, object]] = {
    "response": {},
    "response, features by cwd": {"feature_loss": "cwd"},
    "response, features by pkd": {"feature_loss": "pkd"},
    "response, features by score-l2": {"feature_loss": "score-l2"},
    "l2": {"distill_loss": "l2"},
    "kl": {"distill_loss": "kl"},
    "objectness": {"distill_loss": "objectness"},
    "boxes": {"distill_loss": "boxes"},
}
OBJECTS = 12  # per image
CELLS_OF_AN_OBJECT = 1  # above an objectness of a half: about twice as many detections as labels
# Standard deviation of the teacher's objectness logits: a trained network is certain of most cells.
CERTAINTY = 8.0
# In the middle of an epoch, at a step where the gradient ratio is not sampled.
PROGRESS = Progress(2510, 25, 100, 100)
SAMPLED = Progress(2525, 25, 100, 100)  # a step where it is sampled
STEPS_ON_GPU = 4  # between two synchronisations, as the steps of an epoch do not synchronise either


class NoScores:
    """Stands for the scores of a validation split that does not exist."""

    def over(self, _classes: object = None) -> tuple[float, float]:
        """Return zeros."""
        return 0.0, 0.0


class Bench:
    """Networks, a batch and trainers for one configuration."""

    def __init__(
        self, student: str, teacher: str, size: int, batch: int, device: torch.device, classes: int = 20
    ) -> None:
        torch.manual_seed(0)
        self.size, self.count, self.device = size, batch, device
        self.names = tuple(f"class {number}" for number in range(classes))
        self.student = self._network(student)
        self.folder = tempfile.TemporaryDirectory()
        self.teacher_file = Path(self.folder.name) / "teacher.pt"
        self.batch = self._batch()
        model = self._seeing(self._network(teacher))
        save_checkpoint(self.teacher_file, model=model, epoch=0, best_fitness=0.0, meta={})

    def _network(self, name: str) -> Model:
        model = Model(f"models/{name}.yaml", nc=len(self.names))
        model.names = list(self.names)
        return model

    def _batch(self) -> Batch:
        # Patches of colour: of noise, a network sees the same everywhere.
        patches = torch.randint(0, 256, (self.count, 3, max(self.size // 32, 2), max(self.size // 32, 2)))
        images = F.interpolate(patches.float(), size=(self.size, self.size), mode="bilinear").byte()
        targets = torch.rand(self.count * OBJECTS, 6)
        targets[:, 0] = torch.arange(self.count).repeat_interleave(OBJECTS)
        targets[:, 1] = torch.randint(0, len(self.names), (len(targets),))
        targets[:, 4:] = targets[:, 4:] * 0.3 + 0.05
        batch = Batch(
            images.to(memory_format=torch.channels_last), targets, torch.ones(self.count, dtype=torch.bool)
        )
        return batch.pin_memory() if self.device.type == "cuda" else batch

    @torch.no_grad()
    def _seeing(self, model: Model) -> Model:
        """Change the head of a randomly initialised network so that it detects a few cells per label."""
        model.eval().to(memory_format=torch.channels_last)
        features = model.forward_features(self.batch.to_float().images)
        scores = []
        for convolution, maps in zip(model.head.m, features, strict=True):
            assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
            rows = convolution.weight.view(model.head.na, -1, maps.shape[1])
            biases = convolution.bias.view(model.head.na, -1)
            # Without what all cells have in common, which reduced precision would leave little beside.
            common = F.normalize(maps.mean((0, 2, 3)), dim=0)
            weights = rows[:, 4] - (rows[:, 4] @ common)[:, None] * common
            weights /= torch.einsum("ac,bchw->abhw", weights, maps).flatten(1).std(1)[:, None].clamp(min=1e-6)
            rows[:, 4], biases[:, 4], biases[:, 5:] = weights * CERTAINTY, 0.0, 2.0
            scores.append(torch.einsum("ac,bchw->abhw", rows[:, 4], maps).flatten())
        wanted = min(CELLS_OF_AN_OBJECT * OBJECTS * self.count, sum(map(len, scores)))
        least = torch.cat(scores).topk(wanted).values[-1]
        for convolution in model.head.m:
            # Above an objectness of a half.
            cast(Tensor, convolution.bias).view(model.head.na, -1)[:, 4] = -least
        return model

    def trainer(self, precision: str = "auto", **distilled: object) -> Trainer:
        """Return the trainer of a run with these options of train_distill.py; of a plain run without any.

        precision: value of --amp-dtype.
        """
        model = copy.deepcopy(self.student).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        hyp = replace(Hyperparameters(), nbs=self.count)
        options = TrainOptions(batch_size=self.count, amp_dtype=cast(Any, precision))
        detection = setup.detection_loss(model, options, hyp, self.size).to(self.device)
        ema = ModelEma(model)
        losses: list[Loss] = [detection]
        if distilled:
            known: dict[str, Any] = {"teacher": (str(self.teacher_file),), "batch_size": self.count}
            given = DistillOptions(**known | distilled)
            context = LossContext(
                model=model,
                ema=ema.model,
                is_new=False,
                names=self.names,
                merged=(),
                image_size=self.size,
                device=self.device,
                detection=detection,
                evaluate=lambda _: NoScores(),
                say=lambda _: None,
                warn=lambda _: None,
            )
            losses = list(distillation_recipe(given)(context))
        step = TrainingStep(model, losses).to(self.device)
        step.train()
        trainer = setup.build_trainer(step, ema, options, hyp, self.size, self.device)
        step.compute_in(teacher_dtype(options.amp, options.amp_dtype, self.device))
        return trainer

    def with_cuda_graphs(self, trainer: Trainer) -> Trainer:
        """Return the trainer with its networks as CUDA graphs on a GPU, as in a run."""
        replay_step(trainer, (self.count, 3, self.size, self.size), print)
        return trainer

    def compiled(self, trainer: Trainer) -> Trainer:
        """Return the trainer with its networks compiled, as by --compile."""
        images = self.batch.to(self.device).to_float().images
        cached = not replays_student(trainer)
        compile_step(trainer.step, Compiler(print), images, trainer.amp_dtype, cached)
        return trainer

    def step(self, trainer: Trainer, progress: Progress = PROGRESS) -> Callable[[], object]:
        """Return a step of a trainer as in an epoch, from the loader's batch to the check for NaNs."""

        def run() -> None:
            batch, terms = trainer.train_on(self.batch, progress)
            trainer.meters.update(terms)
            trainer.guard.check(batch, progress, terms)

        return run

    def teacher_alone(self, trainer: Trainer) -> Callable[[], object]:
        """Return the forward pass of a distilled trainer's teacher."""
        distiller = trainer.step.losses[-1]
        assert isinstance(distiller, Distiller)
        images = self.batch.to(self.device).to_float().images

        def run() -> object:
            with torch.autocast(self.device.type, trainer.amp_dtype, enabled=trainer.amp_dtype is not None):
                return distiller.teachers(images)

        return run

    def conventional_step(self, trainer: Trainer) -> Callable[[], object]:
        """Return a conventional plain step: contiguous format, loops over parameters, loss read each step."""
        step, groups = trainer.step, trainer.optimizer.param_groups
        step.to(memory_format=torch.contiguous_format)
        average: dict[str, Tensor] = {k: v.clone() for k, v in step.model.state_dict().items()}
        parameters = [p for group in groups for p in group["params"]]
        optimizer = torch.optim.SGD(
            [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups],
            lr=0.01, momentum=0.937, nesterov=True, foreach=False,
        )  # fmt: skip

        @torch.no_grad()
        def follow(decay: float) -> None:
            for name, value in step.model.state_dict().items():
                if value.dtype.is_floating_point:
                    average[name].mul_(decay).add_(value, alpha=1 - decay)

        def run() -> None:
            images = self.batch.images.to(self.device, non_blocking=True).contiguous().float() / 255
            with torch.autocast(self.device.type, trainer.amp_dtype, enabled=trainer.amp_dtype is not None):
                terms: dict[str, Tensor] = step(replace(self.batch, images=images), PROGRESS)
            total: Tensor = sum(terms.values(), start=torch.zeros((), device=self.device))
            trainer.scaler.scale(total * len(images)).backward()  # type: ignore[no-untyped-call]
            trainer.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, 10.0, foreach=False)
            trainer.scaler.step(optimizer)
            trainer.scaler.update()
            optimizer.zero_grad()
            follow(1 - math.exp(-1))
            float(total.detach())

        return run


def variants(bench: Bench, compiled: bool, reduced: bool) -> dict[str, Callable[[], object]]:
    """Return further variants: a `response` step that samples gradients, and steps in bf16 and compiled.

    On a GPU also the steps without CUDA graphs.
    """
    kinds = [("in bf16", "bf16", False)] if reduced else []
    kinds += [("compiled", "auto", True)] if compiled else []
    distilled = bench.with_cuda_graphs(bench.trainer(distill_loss="response"))
    work = {"`response`, where gradients are compared": bench.step(distilled, SAMPLED)}
    if bench.device.type == "cuda":
        bare = bench.trainer(distill_loss="response")
        work["teacher's forward, nothing recorded"] = bench.teacher_alone(bare)
        work["plain step, nothing recorded"] = bench.step(bench.trainer())
        work["`response`, nothing recorded"] = bench.step(bare)
    for words, precision, is_compiled in kinds:
        trainers = bench.trainer(precision), bench.trainer(precision, distill_loss="response")
        if is_compiled:
            trainers = (
                bench.with_cuda_graphs(bench.compiled(trainers[0])),
                bench.with_cuda_graphs(bench.compiled(trainers[1])),
            )
        work[f"plain step {words}"] = bench.step(trainers[0])
        work[f"teacher's forward {words}"] = bench.teacher_alone(trainers[1])
        work[f"`response` {words}"] = bench.step(trainers[1])
    return work


def main() -> None:
    options = parser(__doc__, rounds=10, busy=True)
    options.add_argument("--student", default="yolov5s")
    options.add_argument("--teacher", default="yolov5m")
    options.add_argument("--img", type=int, default=320)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--classes", type=int, default=20)
    options.add_argument("--presets", nargs="*", default=list(PRESETS), choices=list(PRESETS))
    options.add_argument("--compile", action="store_true", help="also time compiled steps")
    options.add_argument("--no-bf16", action="store_true", help="leave steps in bf16 on a CPU out")
    given = options.parse_args()
    device = device_of(given.device)
    bench = Bench(given.student, given.teacher, given.img, given.batch, device, given.classes)
    print(
        f"{given.student} under {given.teacher}, {given.img} px, batch {given.batch}, "
        f"{given.classes} classes, {given.rounds} rounds"
    )
    distilled = {
        name: bench.with_cuda_graphs(bench.trainer("auto", **({"distill_loss": "response"} | PRESETS[name])))
        for name in given.presets
    }
    work = {
        "plain": bench.step(bench.with_cuda_graphs(bench.trainer())),
        "common": bench.conventional_step(bench.trainer()),
    }
    if distilled:
        work["teacher"] = bench.teacher_alone(bench.with_cuda_graphs(bench.trainer(distill_loss="response")))
    work |= {name: bench.step(trainer) for name, trainer in distilled.items()}
    reduced = device.type == "cpu" and cpu_computes_bf16() and not given.no_bf16
    others = variants(bench, given.compile, reduced)
    repeats = STEPS_ON_GPU if device.type == "cuda" else 1
    together = {name: repeated(piece, repeats) for name, piece in (work | others).items()}
    times = medians(together, given.rounds, device, clock=clock_of(given))
    times = {name: seconds / repeats for name, seconds in times.items()}
    table(["", "median", "of a plain step", "of the floor"], rows_of(times, list(distilled), list(others)))


def repeated(piece: Callable[[], object], count: int) -> Callable[[], None]:
    """Return a function that runs `piece` `count` times."""

    def run() -> None:
        for _ in range(count):
            piece()

    return run


def rows_of(times: Mapping[str, float], distilled: Sequence[str], others: Sequence[str]) -> list[list[str]]:
    """Return the table rows: the plain step, the floor, the distilled steps, and the variants."""
    plain, floor = times["plain"], times["plain"] + times.get("teacher", 0.0)
    rows = [
        ["plain step in the common way", ms(times["common"]), f"{times['common'] / plain:.2f}", ""],
        ["plain step", ms(plain), "1", ""],
    ]
    if distilled:
        rows.append(["teacher's forward", ms(times["teacher"]), f"{times['teacher'] / plain:.2f}", ""])
        rows.append(["floor: plain and teacher", ms(floor), f"{floor / plain:.2f}", "1"])
    rows += [
        [f"`{name}`", ms(times[name]), f"{times[name] / plain:.2f}", f"{times[name] / floor:.3f}"]
        for name in distilled
    ]
    return rows + [[name, ms(times[name]), f"{times[name] / plain:.2f}", ""] for name in others]


if __name__ == "__main__":
    main()
