"""What a new network takes over from weights that are not quite its own."""

from __future__ import annotations

import torch

from models.checkpoint import Checkpoint, listed_anchors
from models.names import partners
from models.yolo import Model


def transfer_weights(model: Model, checkpoint: Checkpoint, exclude_anchors: bool = False) -> tuple[int, int]:
    """Copies the entries whose name and shape agree; gives how many did, and of how many.

    `exclude_anchors` leaves the model its own anchors.
    """
    own = model.state_dict()
    fitting = {
        name: value
        for name, value in checkpoint.state.items()
        if name in own
        and own[name].shape == value.shape
        and not (exclude_anchors and name.endswith(".anchors"))
    }
    model.load_state_dict(fitting, strict=False)
    model.yaml["anchors"] = listed_anchors(model)
    return len(fitting), len(own)


@torch.no_grad()
def transfer_head(model: Model, checkpoint: Checkpoint) -> list[int]:
    """Copies the head's outputs for boxes, objectness and the classes that both know by name.

    Where the heads differ in their classes alone, in number or in order; `transfer_weights` leaves such a
    head as new as it is. Gives the numbers of the model's classes that were taken over.
    """
    numbers = partners(checkpoint.names, model.names)
    known = {mine: theirs for mine, theirs in enumerate(numbers) if theirs is not None}
    if not known or numbers == list(range(len(checkpoint.names))):
        return []
    head, outputs = model.head, 5 + len(checkpoint.names)
    rows = torch.tensor([0, 1, 2, 3, 4, *(5 + mine for mine in known)])
    others = torch.tensor([0, 1, 2, 3, 4, *(5 + theirs for theirs in known.values())])
    pairs = []
    for name, own in head.m.named_parameters(f"model.{len(model.model) - 1}.m"):
        value = checkpoint.state.get(name)
        if value is None or value.shape != (head.na * outputs, *own.shape[1:]):
            return []
        pairs.append((own, value))
    for own, value in pairs:
        views = [each.view(head.na, -1, *each.shape[1:]) for each in (own, value.to(own))]
        views[0][:, rows] = views[1][:, others]
    return list(known)
