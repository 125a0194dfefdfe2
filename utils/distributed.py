"""Ranks: who am I among the processes of a run. A leaf that losses and loader may import.

`torchrun` starts the processes and tells each its place by environment variables; all the rest is
torch's own process group.
"""

from __future__ import annotations

import os
import time
import uuid
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
_LOOK = 0.05  # seconds between two looks at what the first rank has told
PATIENCE = timedelta(minutes=30)  # the first rank may index a large dataset while the others wait


@contextmanager
def joined_ranks() -> Iterator[None]:
    """Joins the processes that torchrun started; does nothing where it started one or none.

    Left by an error the group is not taken down: that would wait for ranks which are waiting for
    this one. torchrun ends them as soon as this one is gone.

    Raises UserError where another process is gone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ or is_distributed():
        yield
        return
    # Both kinds: a GPU may be there and the run be asked to stay on the CPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, own, count = next(rendezvous("env://", timeout=PATIENCE))
    own_part = dist.PrefixStore(_common_word(store, own, count), store)  # type: ignore[attr-defined]
    _turns.begin(own_part)
    dist.init_process_group(backend, store=own_part, rank=own, world_size=count, timeout=PATIENCE)
    try:
        yield
    except RuntimeError as error:
        if is_lost_rank(error):
            fix = "its own message says why; torchrun --max-restarts N goes on by itself"
            raise UserError(f"another process of this run is gone ({error})", "torchrun", fix) from error
        raise
    dist.destroy_process_group()
    _turns.begin(None)


def _common_word(store: Store, own: int, count: int) -> str:
    """A word that the processes of this start have in common, and with no earlier ones.

    After a restart torchrun's store still has the addresses of processes that are gone, and on several
    machines the launchers count restarts each for itself. So every rank asks the first one with a word
    of its own, and what that answers is for nobody who asked before.
    """
    word = uuid.uuid4().hex
    if own > 0:
        store.set(f"rank {own} asks", word)
        answer = str(store.get(f"answer to {word}"), "ascii")  # waits for it
        store.add(f"{answer} is heard", 1)
        return answer
    limit = time.monotonic() + PATIENCE.total_seconds()
    while store.add(f"{word} is heard", 0) < count - 1:
        for other in range(1, count):
            if store.check([f"rank {other} asks"]):
                store.set(f"answer to {str(store.get(f'rank {other} asks'), 'ascii')}", word)
        if time.monotonic() > limit:
            raise UserError(f"not all of {count} processes have come", "torchrun", "look at their own words")
        time.sleep(0.05)
    return word


def restarts() -> int:
    """How often torchrun has started the processes again; of several launchers not all may have counted."""
    return max(from_all(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))))


def is_lost_rank(error: Exception) -> bool:
    """Whether an error says that another process cannot be reached any more."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def local_rank() -> int:
    """The number of this process among those on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_distributed() else 0


def processes_of_command() -> int:
    """The number of processes that a single torchrun started; 1 where it did so on several machines.

    Of these each has a command of its own, which only its user knows.
    """
    return world_size() if processes_here() == world_size() else 1


def processes_here() -> int:
    """The number of processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_distributed() else 1


@contextmanager
def main_first() -> Iterator[None]:
    """Lets the first rank through alone, then the others: they find its files ready.

    However long it takes: data may have to be fetched. Should the first rank end in it, torchrun ends the
    others.
    """
    if is_distributed() and rank() > 0:
        _turns.wait()
    yield
    if is_distributed() and rank() == 0:
        _turns.tell()


class _Turns:
    """What the first rank tells the others between two barriers, which have a limit of time."""

    def __init__(self) -> None:
        self._store: Store | None = None
        self._count = 0

    def begin(self, store: Store | None) -> None:
        """Takes the store that the ranks have in common; None: barriers must do."""
        self._store, self._count = store, 0

    def tell(self) -> None:
        """Lets the others go on."""
        if self._store is None:
            dist.barrier()
            return
        self._count += 1
        self._store.set(f"the first was here {self._count}", "")

    def wait(self) -> None:
        """Comes back when the first rank has told."""
        if self._store is None:
            dist.barrier()
            return
        self._count += 1
        while not self._store.check([f"the first was here {self._count}"]):
            time.sleep(_LOOK)


_turns = _Turns()


def wait_for_all() -> None:
    """Comes back when every rank has come here."""
    if is_distributed():
        dist.barrier()


def from_main(value: _T) -> _T:
    """The first rank's value, on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: _T) -> list[_T]:
    """The values of all ranks, in their order, on every rank."""
    if not is_distributed():
        return [value]
    boxes: list[_T | None] = [None] * world_size()
    dist.all_gather_object(boxes, value)
    return boxes  # type: ignore[return-value]  # all are filled


class Vote:
    """The largest of the numbers that the ranks give, told to all of them at the same call.

    The answer is that of the call before: it comes in while a step is computed, so that nobody waits for
    it. Numbers go from processor to processor (gloo) where gradients go from GPU to GPU, so that nobody
    waits for a GPU either. In a single process the answer is the number itself, at once.
    """

    def __init__(self) -> None:
        self._number: Tensor | None = None
        self._work: dist.Work | None = None

    def __call__(self, number: int) -> int:
        """Hands in this rank's number, 0 or more; gives what came of the call before, at first 0."""
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
    """Gives every rank the first one's buffers, and parameters unless they are the same anyway."""
    if not is_distributed():
        return
    with torch.no_grad():
        for value in (*(module.parameters() if parameters else ()), *module.buffers()):
            dist.broadcast(value.detach(), src=0)


def is_distributed() -> bool:
    """Whether a process group is up."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """The number of processes of the run, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """The number of this process, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, without gradient; the value itself in a single process."""
    value = value.detach()
    if not is_distributed():
        return value
    total = value.clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


class _FromRanks(torch.autograd.Function):
    """The values of all ranks; what any of them makes of one comes back to the rank that gave it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        parts = [torch.empty_like(value) for _ in range(world_size())]
        dist.all_gather(parts, value.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0].contiguous())[rank()]


def from_ranks(value: Tensor) -> Tensor:
    """The tensors of all ranks, of one shape (...), stacked to (ranks, ...), with gradient to each.

    As with all that goes over ranks, all of them have to come here, and again in the backward pass.
    """
    gathered: Tensor = _FromRanks.apply(value) if is_distributed() else value[None]
    return gathered


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch, each rank apart from the others."""
    import random

    import numpy as np

    random.seed(seed + rank())
    np.random.seed((seed + rank()) % 2**32)
    torch.manual_seed(seed + rank())
