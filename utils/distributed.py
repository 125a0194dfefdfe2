"""Ranks, process group and collectives. Imports no other part of training, so losses and loader may use it.

`torchrun` starts the processes and passes each its rank in environment variables; everything else is
torch's own process group.
"""

from __future__ import annotations

import os
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from utils.errors import UserError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_T = TypeVar("_T")
_LOOK = 0.05  # seconds between polls of the store
PATIENCE = timedelta(minutes=30)  # the first rank may index a large dataset while the others wait


@contextmanager
def joined_ranks() -> Iterator[None]:
    """Set up the process group of torchrun's processes; does nothing for a single process.

    On an error the group is not destroyed: that would wait for ranks which are waiting for this one.
    torchrun ends them as soon as this process exits.

    Raises UserError if another process is gone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ or is_distributed():
        yield
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        fix = "start it with torchrun, or unset WORLD_SIZE and RANK, which something else has left"
        raise UserError("is not set, although WORLD_SIZE and RANK are", missing[0], fix)
    # Both backends: the run may be asked to stay on the CPU although there is a GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, own_rank, count = next(rendezvous("env://", timeout=PATIENCE))
    own_store = dist.PrefixStore(_store_prefix(store, own_rank, count), store)  # type: ignore[attr-defined]
    _turns.begin(own_store)
    dist.init_process_group(backend, store=own_store, rank=own_rank, world_size=count, timeout=PATIENCE)
    try:
        yield
    except RuntimeError as error:
        if is_lost_rank(error):
            fix = "its own message says why; torchrun --max-restarts N goes on by itself"
            raise UserError(f"another process of this run is gone ({error})", "torchrun", fix) from error
        raise
    dist.destroy_process_group()
    _turns.begin(None)


def _store_prefix(store: Store, own_rank: int, count: int) -> str:
    """Return a key prefix shared by the processes of this start, and by none of an earlier one.

    After a restart torchrun's store still holds the addresses of processes that are gone, and on several
    machines each launcher counts restarts on its own. So every rank sends the first one a unique token, and
    the answer is stored under that token, where no earlier process looks.
    """
    token = uuid.uuid4().hex
    if own_rank > 0:
        store.set(f"rank {own_rank} asks", token)
        prefix = str(store.get(f"answer to {token}"), "ascii")  # blocks until it is there
        store.add(f"{prefix} is heard", 1)
        return prefix
    limit = time.monotonic() + PATIENCE.total_seconds()
    while store.add(f"{token} is heard", 0) < count - 1:
        for other in range(1, count):
            if store.check([f"rank {other} asks"]):
                store.set(f"answer to {str(store.get(f'rank {other} asks'), 'ascii')}", token)
        if time.monotonic() > limit:
            raise UserError(f"not all of {count} processes have come", "torchrun", "look at their own words")
        time.sleep(_LOOK)
    return token


def restarts() -> int:
    """Return how often torchrun restarted the processes: the maximum, as launchers may count differently."""
    return max(from_all(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))))


def is_lost_rank(error: Exception) -> bool:
    """Return whether an error means that another process is no longer reachable."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def local_rank() -> int:
    """Return the rank of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_distributed() else 0


def processes_of_command() -> int:
    """Return the number of processes started by a single torchrun; 1 for a run on several machines.

    There each machine has its own command, which only the user knows.
    """
    return world_size() if processes_here() == world_size() else 1


def processes_here() -> int:
    """Return the number of the run's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_distributed() else 1


@contextmanager
def main_first() -> Iterator[None]:
    """Run the block on the first rank, then on the others, which find its files ready.

    There is no time limit, since data may have to be downloaded. If the first rank exits within it,
    torchrun ends the others.
    """
    if is_distributed() and rank() > 0:
        _turns.wait_for_signal()
    yield
    if is_distributed() and rank() == 0:
        _turns.signal()


class _Turns:
    """Signals from the first rank to the others through the store: a barrier would have a timeout."""

    def __init__(self) -> None:
        self._store: Store | None = None
        self._count = 0

    def begin(self, store: Store | None) -> None:
        """Set the store that the ranks share; None: fall back to barriers."""
        self._store, self._count = store, 0

    def signal(self) -> None:
        """Signal the other ranks to continue."""
        if self._store is None:
            dist.barrier()
            return
        self._count += 1
        self._store.set(f"the first was here {self._count}", "")

    def wait_for_signal(self) -> None:
        """Block until the first rank has signalled."""
        if self._store is None:
            dist.barrier()
            return
        self._count += 1
        while not self._store.check([f"the first was here {self._count}"]):
            time.sleep(_LOOK)


_turns = _Turns()


def wait_for_all() -> None:
    """Block until every rank gets here."""
    if is_distributed():
        dist.barrier()


def from_main(value: _T) -> _T:
    """Return the first rank's value on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: _T) -> list[_T]:
    """Return the values of all ranks, in rank order, on every rank."""
    if not is_distributed():
        return [value]
    boxes: list[_T | None] = [None] * world_size()
    dist.all_gather_object(boxes, value)
    return boxes  # type: ignore[return-value]  # all are filled


class Vote:
    """An asynchronous maximum over ranks, with the same answer on all of them at each call.

    The answer is that of the previous call: the all-reduce runs while a step is computed, so nobody waits
    for it. It goes over the CPU (gloo), so it does not synchronise with the GPU either. In a single
    process the answer is the number itself, immediately.
    """

    def __init__(self) -> None:
        self._number: Tensor | None = None
        self._work: dist.Work | None = None

    def __call__(self, number: int) -> int:
        """Submit this rank's number, 0 or more; return the maximum of the previous call, at first 0."""
        if not is_distributed():
            return number
        answer = 0
        if self._work is not None and self._number is not None:
            self._work.wait()
            answer = int(self._number)
        self._number = torch.tensor(number)
        self._work = dist.all_reduce(self._number, op=dist.ReduceOp.MAX, async_op=True)
        return answer


def share_state(module: nn.Module, *, parameters: bool = True) -> None:
    """Broadcast the first rank's buffers, and its parameters unless those are known to be the same."""
    if not is_distributed():
        return
    with torch.no_grad():
        for value in (*(module.parameters() if parameters else ()), *module.buffers()):
            dist.broadcast(value.detach(), src=0)


class SharedBuffers:
    """The floating-point buffers of a module, of which all ranks can be given the first one's."""

    def __init__(self, module: nn.Module) -> None:
        """The module must not move to another device afterwards."""
        buffers: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for buffer in module.buffers():
            if buffer.is_floating_point():  # others count steps, which all ranks take
                buffers[buffer.dtype].append(buffer)
        self._buffers = [own for own in buffers.values() if own[0].numel() or len(own) > 1]

    @torch.no_grad()
    def share(self) -> None:
        """Copy the first rank's buffers to all ranks: a collective, one for each type."""
        for buffers in self._buffers if is_distributed() else ():
            together = torch.cat([buffer.reshape(-1) for buffer in buffers])
            dist.broadcast(together, src=0)
            if rank() > 0:
                parts = torch.split(together, [buffer.numel() for buffer in buffers])
                shaped = [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)]
                torch._foreach_copy_(buffers, shaped)


def is_distributed() -> bool:
    """Return whether a process group is initialised."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Return the number of processes of the run, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """Return the rank of this process, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, without gradient; in a single process the detached value."""
    value = value.detach()
    if not is_distributed():
        return value
    total = value.clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


class _FromRanks(torch.autograd.Function):
    """All-gather; backward returns to each rank the gradient of its value, summed over ranks."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        parts = [torch.empty_like(value) for _ in range(world_size())]
        dist.all_gather(parts, value.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0].contiguous())[rank()]


def from_ranks(value: Tensor) -> Tensor:
    """Stack the tensors of all ranks, of equal shape (...), to (ranks, ...), with gradient to each.

    A collective: all ranks must call it, and run its backward pass.
    """
    gathered: Tensor = _FromRanks.apply(value) if is_distributed() else value[None]
    return gathered


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, each rank differently."""
    import random

    import numpy as np

    random.seed(seed + rank())
    np.random.seed((seed + rank()) % 2**32)
    torch.manual_seed(seed + rank())
