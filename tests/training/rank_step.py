"""One rank's part of test_ranks.py: the gradient of a step, as data-parallel training adds it up.

python rank_step.py RANK RANKS STORE OUT [exchange]

exchange: the gradients after the backward pass, as where that is a CUDA graph.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn

from models.yolo import Model
from utils.batch import Batch, Progress
from utils.datasets.sampling import TrainingOrder
from utils.distillation.distiller import Distiller
from utils.distillation.ensemble import Teachers
from utils.distillation.features import FeatureLoss
from utils.distillation.response import Response
from utils.distillation.teacher import Teacher
from utils.losses.detection import DetectionLoss, LossGains
from utils.training.ema import ModelEma
from utils.training.exchange import GradientExchange
from utils.training.guard import StepGuard
from utils.training.loop import Trainer
from utils.training.optimizer import RateSchedule, build_optimizer
from utils.training.setup import in_parallel
from utils.training.step import TrainingStep

IMAGES, TOGETHER, NAMES = 7, 4, ["a", "b", "c"]


class ForbidCollectives:
    """Stands for a CUDA graph, within which ranks cannot exchange anything."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, *given):
        reduce, dist.all_reduce = dist.all_reduce, None
        try:
            return self.inner(*given)
        finally:
            dist.all_reduce = reduce


def network(seed):
    torch.manual_seed(seed)
    model = Model("models/yolov5n.yaml", nc=len(NAMES))
    model.names = list(NAMES)
    return model


def pictures():
    """Seven, of which the third has no objects and the sixth no labels."""
    g = torch.Generator().manual_seed(1)
    images = torch.rand(IMAGES, 3, 64, 64, generator=g)
    image = torch.tensor([0.0, 0, 1, 3, 3, 4, 6])[:, None]
    boxes = torch.rand(7, 4, generator=g) * 0.4 + 0.3
    targets = torch.cat((image, torch.randint(0, 3, (7, 1), generator=g).float(), boxes), 1)
    labelled = torch.tensor([True] * 5 + [False, True])
    return images, targets, labelled


def batch_of(numbers):
    images, targets, labelled = pictures()
    rows = [targets[targets[:, 0] == number] for number in numbers]
    for place, row in enumerate(rows):
        row[:, 0] = place
    return Batch(images[numbers], torch.cat(rows), labelled[numbers])


def trainer(exchanged):
    student = network(0)
    detection = DetectionLoss(student.head.anchors, 3, LossGains())
    teachers = Teachers([Teacher(network(1))], student, NAMES)
    channels = [conv.in_channels for conv in student.head.m]
    torch.manual_seed(2)
    projected = FeatureLoss("score-l2", channels, channels)
    response = Response(LossGains(), student.head.anchors)
    step = TrainingStep(student, [detection, Distiller(teachers, response, 1.0, features=[projected])])
    # Statistics of norms are a rank's own; with fixed ones everything else must agree.
    step.train()
    for module in step.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    ema = ModelEma(student)
    optimizer = build_optimizer([step], "SGD", rate=0.1, momentum=0.9, weight_decay=0.0)
    schedule = RateSchedule(0.1, 1.0, False, 0.9, 0, 0.9, 0.1, TOGETHER, nominal_batch=10_000)
    exchange = GradientExchange(step) if exchanged else None
    if exchanged:
        for loss in step.losses:
            loss.replay_terms(ForbidCollectives)
    return Trainer(
        step=step, optimizer=optimizer, schedule=schedule, ema=ema, device=torch.device("cpu"),
        scaler=torch.amp.GradScaler("cpu", init_scale=1.0), guard=StepGuard([student]),
        parallel=None if exchanged else in_parallel(step, torch.device("cpu")), exchange=exchange,
    )  # fmt: skip


def main():
    rank, ranks, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    run, order = (
        trainer("exchange" in sys.argv[5:]),
        TrainingOrder(IMAGES, TOGETHER // ranks, (64, 64), seed=0),
    )
    order.mosaic_until = 0
    losses = []
    for step, numbers in enumerate(batch.rows[:, 0].tolist() for batch in order):
        batch = batch_of(numbers)
        terms = run.run_batch(batch, Progress(step, 0, len(order), 1))
        shares = torch.tensor([float(value.detach()) * len(numbers) for value in terms.values()])
        if ranks > 1:
            dist.all_reduce(shares)
        losses.append(shares)
    gradients = {name: p.grad for name, p in run.step.named_parameters() if p.grad is not None}
    torch.save({"losses": torch.stack(losses), "names": list(terms), "gradients": gradients}, out)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
