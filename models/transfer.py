"""Transfer of weights to a network that differs from the one they were trained for."""

from __future__ import annotations

import torch
from torch import Tensor

from models.checkpoint import Checkpoint, listed_anchors
from models.names import partners
from models.yolo import Model, rows_of_classes


def transfer_weights(
    model: Model, checkpoint: Checkpoint, exclude_anchors: bool = False, exclude_head: bool = False
) -> tuple[int, int]:
    """Copy the state dict entries with matching name and shape; return how many, and the model's total.

    `exclude_anchors` keeps the model's own anchors, `exclude_head` the convolutions of its head.
    """
    own, head = model.state_dict(), _head_of(model)
    fitting = {
        name: value
        for name, value in checkpoint.state.items()
        if name in own
        and own[name].shape == value.shape
        and not (exclude_anchors and name.endswith(".anchors"))
        and not (exclude_head and name.startswith(f"{head}.m."))
    }
    model.load_state_dict(fitting, strict=False)
    model.yaml["anchors"] = listed_anchors(model)
    return len(fitting), len(own)


def known_by_name(model: Model, checkpoint: Checkpoint) -> dict[int, int]:
    """Map the model's class indices to the checkpoint's, by name.

    Empty if both have the same classes in the same order, or share none.
    """
    numbers = partners(checkpoint.names, model.names)
    if numbers == list(range(len(checkpoint.names))):
        return {}
    return {mine: theirs for mine, theirs in enumerate(numbers) if theirs is not None}


def has_anchors_of(model: Model, checkpoint: Checkpoint) -> bool:
    """Return whether the model has the anchors of the checkpoint."""
    theirs, own = checkpoint.state.get(f"{_head_of(model)}.anchors"), model.head.anchors.cpu()
    return theirs is not None and theirs.shape == own.shape and torch.allclose(theirs.float(), own, rtol=1e-3)


@torch.no_grad()
def transfer_head(model: Model, checkpoint: Checkpoint) -> bool:
    """Copy the head's outputs for boxes, objectness and the classes of `known_by_name`.

    With a single class on either side only boxes and objectness are copied: its class output starts out
    certain and is not trained. Return False, copying nothing, if the heads differ in more than classes.
    """
    known, head = known_by_name(model, checkpoint), model.head
    if 1 in (model.nc, len(checkpoint.names)):
        known = {}
    rows, others = rows_of_classes(known), rows_of_classes(known.values())
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, own in head.m.named_parameters(f"{_head_of(model)}.m"):
        value = checkpoint.state.get(name)
        if value is None or value.shape != (head.na * (5 + len(checkpoint.names)), *own.shape[1:]):
            return False
        pairs.append((own, value.to(own)))
    for pair in pairs:
        mine, theirs = (values.view(head.na, -1, *values.shape[1:]) for values in pair)
        mine[:, rows] = theirs[:, others]
    return True


def _head_of(model: Model) -> str:
    """Return the name of the head in the state dict."""
    return f"model.{len(model.model) - 1}"
