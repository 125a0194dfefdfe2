"""The exchange of gradients between ranks after a backward pass.

DistributedDataParallel exchanges them within the backward pass, piece by piece, while the rest is computed.
A CUDA graph of that pass cannot. Where graphs save more than this overlap, all gradients are exchanged at
once, and everything else is as it is there: the mean over ranks, and the first rank's buffers on all of them.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.distributed import SharedBuffers, share_state, world_size


class GradientExchange:
    """Averages the gradients of a module over ranks; they persist, as views of a few tensors."""

    def __init__(self, module: nn.Module) -> None:
        """Broadcast the first rank's state, a collective, and give each trained parameter a gradient."""
        share_state(module)
        trained: dict[torch.dtype, list[nn.Parameter]] = defaultdict(list)
        for parameter in module.parameters():
            if parameter.requires_grad:
                trained[parameter.dtype].append(parameter)
        self._gradients = [_with_gradients(parameters) for parameters in trained.values()]
        self._buffers = SharedBuffers(module)

    def before_forward(self) -> None:
        """Give every rank the buffers of the first: statistics of batch norms, and those of losses."""
        self._buffers.share()

    @torch.no_grad()
    def after_backward(self) -> None:
        """Replace the gradients by their mean over ranks."""
        for together in self._gradients:
            dist.all_reduce(together)
            together.div_(world_size())


def _with_gradients(parameters: list[nn.Parameter]) -> Tensor:
    """Return one tensor of zeros that holds the gradients of all parameters, each in its memory order."""
    first = parameters[0]
    together = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
    start = 0
    for parameter in parameters:
        # As strided as the parameter, for fused optimizers. A module's parameters have no gaps in memory.
        parameter.grad = together[start:].as_strided(parameter.shape, parameter.stride(), start)
        start += parameter.numel()
    return together
