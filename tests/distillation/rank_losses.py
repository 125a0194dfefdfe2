"""One rank's part of test_ranks.py: losses and gradients of its share of a batch.

python rank_losses.py RANK RANKS STORE OUT
"""

import sys

import torch
import torch.distributed as dist
from torch import nn

from utils.batch import Batch, StudentOutput
from utils.distillation.features import GAINS as GAINS_OF_FEATURES
from utils.distillation.features import FeatureLoss
from utils.distillation.presets import DenseOutputs, ObjectnessGated
from utils.distillation.pseudo_boxes import PseudoBoxes
from utils.distillation.response import Response
from utils.distillation.teacher import TeacherOutput
from utils.losses.detection import DetectionLoss, LossGains

STRIDES = torch.tensor([8.0, 16.0])
SHARES = (3, 2)  # images of each rank
GAINS = LossGains()
ANCHORS = torch.tensor([[[2.0, 3.0], [3.0, 2.0], [4.0, 4.0]], [[3.0, 4.0], [5.0, 5.0], [6.0, 4.0]]])


def losses():
    pseudo = dict(confidence=0.25, overlap=0.45, temperature=2.0)
    return {
        "l2": DenseOutputs(GAINS, "l2", 20.0),
        "kl": DenseOutputs(GAINS, "kl", 20.0),
        "objectness": ObjectnessGated(GAINS),
        "response": Response(GAINS, ANCHORS),
        "boxes": PseudoBoxes(DetectionLoss(ANCHORS, 3, GAINS), STRIDES, soft=False, **pseudo),
        "boxes, soft": PseudoBoxes(DetectionLoss(ANCHORS, 3, GAINS), STRIDES, soft=True, **pseudo),
        "response, a class unknown": Response(GAINS, ANCHORS, complete=False),
        "objectness, a class unknown": ObjectnessGated(GAINS, complete=False),
    }


def whole_batch():
    """Five images, one without objects and one without labels."""
    g = torch.Generator().manual_seed(0)
    count = sum(SHARES)
    levels = [[2 * torch.randn(count, 3, s, s, 8, generator=g) for s in (8, 4)] for _ in range(2)]
    image = torch.tensor([0.0, 0, 1, 3, 3, 3, 3])[:, None]
    boxes = torch.rand(7, 4, generator=g) * 0.4 + 0.3
    targets = torch.cat((image, torch.randint(0, 3, (7, 1), generator=g).float(), boxes), 1)
    labelled = torch.tensor([True, True, True, True, False])
    return Batch(torch.zeros(count, 3, 64, 64), targets, labelled), levels


def part_of(batch, levels, first, count):
    rows = slice(first, first + count)
    own = (batch.targets[:, 0] >= first) & (batch.targets[:, 0] < first + count)
    targets = batch.targets[own].clone()
    targets[:, 0] -= first
    part = Batch(batch.images[rows], targets, batch.labelled[rows])
    return part, [[level[rows].clone() for level in side] for side in levels]


# What the teacher sees in each of the images, as probabilities of one object: below 1 on either rank, above
# or below 1 on both together.
FAINT = {"response, little seen": (0.35, 0.35, 0, 0.35, 0), "response, hardly seen": (0.2, 0, 0, 0, 0.1)}


def faint(levels, seen):
    """The teacher's levels, in which each image has an object of such a probability and no other."""
    levels = [level.clone() for level in levels]
    for level in levels:
        level[..., 4] = -40.0
    levels[0][:, 1, 2, 3, 4] = torch.tensor(seen).clamp(min=1e-12).logit()
    return levels


def gradients(batch, levels, first):
    """By loss: the gradient at the student's levels of what a rank minimises; its images begin at `first`."""
    found = {}
    for name in ("ground truth", *losses(), *FAINT):
        student = [level.clone().requires_grad_() for level in levels[0]]
        output = StudentOutput((), tuple(student))
        if name == "ground truth":
            terms = DetectionLoss(ANCHORS, 3, GAINS)(batch, output)
        elif name in FAINT:
            seen = FAINT[name][first : first + len(batch.images)]
            terms = losses()["response"](batch, output, TeacherOutput(tuple(faint(levels[1], seen))))
        else:
            terms = losses()[name](batch, output, TeacherOutput(tuple(levels[1])))
        (sum(terms.values()) * len(batch.images)).backward()
        found[name] = [level.grad for level in student]
    for kind in GAINS_OF_FEATURES:
        loss = FeatureLoss(kind, [24, 24], [24, 24])
        loss.projections = nn.ModuleList([nn.Identity(), nn.Identity()])
        maps = [[level.movedim(4, 2).flatten(1, 2) for level in side] for side in levels]
        own = [seen.clone().requires_grad_() for seen in maps[0]]
        (loss(own, maps[1], levels[1]) * len(batch.images)).backward()
        found[kind] = [seen.grad for seen in own]
    return found


def main():
    rank, ranks, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    first, (batch, levels) = sum(SHARES[:rank]), whole_batch()
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        batch, levels = part_of(batch, levels, first, SHARES[rank])
    torch.save(gradients(batch, levels, first), out)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
