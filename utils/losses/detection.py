"""The ground-truth loss.

Shapes: B images, L levels, A anchors, H W grid, K classes, M targets, P pairs of a cell's anchor and target.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.decode import boxes_cxcywh_grid
from utils.batch import Batch, Progress, StudentOutput
from utils.boxes import aligned_iou
from utils.device import to_device
from utils.distributed import is_distributed, sum_over_ranks
from utils.losses.assignment import Pairs, assign_targets
from utils.losses.terms import TermsOfTensors, binary_cross_entropy, smoothed_one_hot

_BALANCE_OF_MORE = (4.0, 1.0, 0.25, 0.06, 0.02)  # than three levels
MOST_LEVELS = len(_BALANCE_OF_MORE)


@dataclass(frozen=True)
class LossGains:
    """The gains of the ground-truth loss, exactly as applied (for hyperparameter files see `scaled`).

    box, obj, cls: gains of the three terms. cls_pw, obj_pw: weights of positive targets in BCE.
    anchor_t: a target matches an anchor if no side differs by this factor. fl_gamma: focal exponent,
    0 for plain cross-entropy. label_smoothing: eps of the class targets.
    """

    box: float = 0.05
    obj: float = 1.0
    cls: float = 0.5
    cls_pw: float = 1.0
    obj_pw: float = 1.0
    anchor_t: float = 4.0
    fl_gamma: float = 0.0
    label_smoothing: float = 0.0

    def scaled(self, level_count: int, class_count: int, image_size: int) -> LossGains:
        """Scale the gains of a hyperparameter file (3 levels, 80 classes, 640 px) to those of a run."""
        levels = 3 / level_count
        return replace(
            self,
            box=self.box * levels,
            obj=self.obj * levels * (image_size / 640) ** 2,
            cls=self.cls * levels * class_count / 80,
        )


def level_balance(level_count: int) -> tuple[float, ...]:
    """Return the weights of the levels' objectness terms, finest level first; at most MOST_LEVELS."""
    return (4.0, 1.0, 0.4) if level_count == 3 else _BALANCE_OF_MORE[:level_count]


def global_normaliser(count: Tensor, images: int, *, over_ranks: bool = True) -> Tensor:
    """Return normalisers: each count summed over ranks (at least 1), times this rank's share of the images.

    Each rank's loss is multiplied by its number of images and gradients are summed over ranks, so the
    result equals that of a single process with the whole batch, however the batch is split. `over_ranks`
    False skips the collective, for ranks that run through batches independently, as in validation.
    """
    local = count.detach().float()
    if not over_ranks or not is_distributed():
        return local.clamp(min=1)
    totals = sum_over_ranks(torch.cat((local.reshape(-1), local.new_full((1,), images))))
    return totals[:-1].reshape(local.shape).clamp(min=1) * (images / totals[-1])


ClassLoss = Callable[[Tensor, Pairs], Tensor]


@dataclass(frozen=True)
class AssignedTargets:
    """The assigned targets of raw levels, on their device.

    normalisers: (L + 1,) pairs per level, then labelled images. labelled: (B,) bool.
    mask: (P,) float32, 0 for padding pairs; None without padding.
    """

    pairs: Pairs
    normalisers: Tensor
    labelled: Tensor
    mask: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors; the pairs must be padded."""
        assert self.mask is not None
        return self.pairs.indices(), self.pairs.boxes, self.normalisers, self.labelled, self.mask

    @classmethod
    def of(cls, tensors: Sequence[Tensor], level_count: int) -> AssignedTargets:
        """Rebuild from the result of `tensors`."""
        indices, boxes, normalisers, labelled, mask = tensors
        counts = (len(boxes) // level_count,) * level_count
        return cls(Pairs.of(indices, boxes, counts), normalisers, labelled, mask)


class DetectionLoss(nn.Module):
    """Box (CIoU), objectness (BCE) and class (BCE) loss against the labels.

    Images without labels (`Batch.labelled` False) contribute to no term. In training mode the normalisers
    are summed over ranks (one all-reduce); in evaluation mode each rank uses its own.

    Source: the public recipe of YOLOv5; CIoU: Zheng et al. (arXiv 1911.08287), eq. 10.
    """

    names: tuple[str, ...] = ("box", "obj", "cls")
    label = "gt"

    def __init__(
        self,
        anchors_grid: Tensor,
        class_count: int,
        gains: LossGains,
        *,
        balance: Sequence[float] | None = None,
        complete: bool = True,
        has_class_term: bool | None = None,
    ) -> None:
        """`anchors_grid`: (L, A, 2) in grid units; `gains` exactly as to be applied.

        balance: weights of the levels' objectness; None for the default of a head with these levels.
        complete: whether a cell without a target is background; if not, it is ignored.
        has_class_term: whether there is a class term; None: if there is more than one class.
        """
        super().__init__()
        self.anchors_grid: Tensor
        self.register_buffer("anchors_grid", anchors_grid.detach().clone().float(), persistent=False)
        self._anchors_cpu = self.anchors_grid.cpu()
        self.class_count = class_count
        self.has_class_term = class_count > 1 if has_class_term is None else has_class_term
        self.gains = gains
        self.balance = level_balance(len(anchors_grid)) if balance is None else tuple(balance)
        self.complete = complete
        self._shares: tuple[tuple[tuple[int, ...], torch.device], Tensor] | None = None
        self._replayed: TermsOfTensors | None = None

    def forward(
        self, batch: Batch, output: StudentOutput, progress: Progress | None = None
    ) -> dict[str, Tensor]:
        """Return the three weighted float32 scalars; their sum times the batch size is minimised."""
        if self._replayed is None or not self.training:
            assigned = self.assign(batch.targets, output.levels, batch.labelled)
            return self.compare(output.levels, assigned, self._against_labels)
        assigned = self.assign(batch.targets, output.levels, batch.labelled, padded=True)
        return dict(zip(self.names, self._replayed(output.levels, assigned.tensors()).unbind(), strict=True))

    def replay_terms(self, replayed: Callable[[TermsOfTensors], TermsOfTensors]) -> None:
        """Wrap the computation after the assignment in `replayed`, for training mode."""
        # On a copy: constants in a captured CUDA graph must not be replaced by those of validation.
        snapshot = copy.copy(self)

        def compared(levels: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
            terms = snapshot.compare(
                levels, AssignedTargets.of(tensors, len(levels)), snapshot._against_labels
            )
            return torch.stack([terms[name] for name in self.names])

        self._replayed = replayed(compared)

    def _against_labels(self, logits: Tensor, pairs: Pairs) -> Tensor:
        targets = smoothed_one_hot(pairs.label, self.class_count, self.gains.label_smoothing)
        return binary_cross_entropy(logits, targets, self.gains.cls_pw, self.gains.fl_gamma)

    def assign(
        self, targets: Tensor, levels: Sequence[Tensor], labelled: Tensor, *, padded: bool = False
    ) -> AssignedTargets:
        """Assign targets (M, 6) to cells of levels of these shapes; return them on the levels' device.

        labelled: (B,) bool, the images whose background counts. Targets in CPU memory are assigned there: on
        a GPU the number of pairs would need a synchronisation.
        """
        device = levels[0].device
        grids = [(level.shape[2], level.shape[3]) for level in levels]
        found = assign_targets(targets, self._anchors_on(targets.device), grids, self.gains.anchor_t)
        numbers = torch.tensor(found.counts, device=labelled.device)
        # All in one tensor: a single copy to the device and a single all-reduce.
        numbers = to_device(torch.cat((numbers, labelled.sum()[None])), device)
        normalisers = self._normalisers(numbers, len(labelled))
        pairs, mask = found.padded() if padded else (found, None)
        return AssignedTargets(
            pairs.to(device),
            normalisers,
            to_device(labelled, device),
            mask if mask is None else to_device(mask, device),
        )

    def compare(
        self, levels: Sequence[Tensor], assigned: AssignedTargets, class_loss: ClassLoss
    ) -> dict[str, Tensor]:
        """Return box, objectness and class term of raw levels against their assigned targets.

        class_loss: maps the pairs' class logits (P, K) to an elementwise loss (P, K).
        """
        pairs, counts, images = assigned.pairs, assigned.normalisers[:-1], assigned.normalisers[-1]
        picked = pairs.pick(levels).float()
        if assigned.mask is not None:  # padding may point at an infinite output, and 0 * inf is NaN
            picked = torch.where(assigned.mask[:, None] > 0, picked, 0.0)
        iou = self.overlaps(picked, pairs)
        share = 1 / counts[pairs.level]  # the mean over each level's pairs, summed over levels
        if assigned.mask is not None:
            iou, share = iou * assigned.mask, share * assigned.mask
        box = ((1 - iou) * share).sum()
        obj = self.objectness([level[..., 4] for level in levels], pairs, iou, assigned.labelled) / images
        cls = torch.zeros((), device=box.device)
        if self.has_class_term:
            cls = (class_loss(picked[:, 5:], pairs).sum(1) * share).sum() / self.class_count
        return {"box": box * self.gains.box, "obj": obj * self.gains.obj, "cls": cls * self.gains.cls}

    def _anchors_on(self, device: torch.device) -> Tensor:
        return self.anchors_grid if device == self.anchors_grid.device else self._anchors_cpu

    def _normalisers(self, count: Tensor, images: int) -> Tensor:
        return global_normaliser(count, images, over_ranks=self.training)

    def overlaps(self, picked: Tensor, pairs: Pairs) -> Tensor:
        """Return the CIoU (P,) of the boxes in raw outputs (P, 5 + K) with their targets."""
        predicted = boxes_cxcywh_grid(picked[:, :4], self.anchors_grid[pairs.level, pairs.anchor])
        return aligned_iou(predicted, pairs.boxes, "ciou")

    def objectness(self, logits: Sequence[Tensor], pairs: Pairs, iou: Tensor, labelled: Tensor) -> Tensor:
        """Return each level's mean BCE, weighted by `balance`, summed over levels and labelled images.

        logits: (B, A, H_l, W_l) of each level. The objectness target is the CIoU (0..1) of the predicted box
        with its target, the largest if a cell and anchor have several, so that their order doesn't matter.
        """
        flat = torch.cat([level.flatten(1) for level in logits], 1)
        targets = torch.zeros(flat.shape, device=flat.device)
        targets.view(-1).scatter_reduce_(
            0, pairs.image * flat.shape[1] + pairs.place, iou.detach().clamp(0, 1), "amax", include_self=True
        )
        error = binary_cross_entropy(flat, targets, self.gains.obj_pw, self.gains.fl_gamma)
        if not self.complete:
            error = error * (targets > 0)
        # An unlabelled image has unknown ground truth, not background only.
        known = labelled.to(error.dtype)[:, None]
        return (
            error * known * self._cell_shares(tuple(level[0].numel() for level in logits), flat.device)
        ).sum()

    def _cell_shares(self, cells: tuple[int, ...], device: torch.device) -> Tensor:
        """Return the weight of each prediction of an image in the objectness term, (N,) over all levels."""
        if self._shares is None or self._shares[0] != (cells, device):
            parts = [
                torch.full((count,), weight / count, device=device)
                for count, weight in zip(cells, self.balance, strict=True)
            ]
            self._shares = (cells, device), torch.cat(parts)
        return self._shares[1]
