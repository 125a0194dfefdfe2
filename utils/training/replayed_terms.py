"""Losses as CUDA graphs.

A loss is a few hundred small kernels, forward and backward, and on a fast GPU launching them takes longer
than running them. Terms that depend on nothing but the values of their tensors are captured once and
launched as two graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from utils.cuda_graphs.capture import (
    CapturePlace,
    Captures,
    capture_key,
    captured,
)
from utils.losses.terms import TermsOfTensors

MAX_CAPTURES = 3  # kinds of inputs that are captured: the memory of each stays allocated
Record = Callable[[TermsOfTensors, Sequence[Tensor], Sequence[Tensor]], TermsOfTensors]


class ReplayedTerms:
    """A function that returns a vector of terms, captured for kinds of inputs seen a few times.

    Other inputs, and those that need no gradient, are computed eagerly.
    """

    def __init__(self, terms: TermsOfTensors, warn: Callable[[str], None], record: Record) -> None:
        """`record` captures; `warn` gets a message if it fails."""
        self._terms, self._record = terms, record
        problem = "a loss cannot be recorded ({}): it runs as it is"
        self._captures = Captures[TermsOfTensors](MAX_CAPTURES, problem, warn)

    def __call__(self, trained: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        """Return the terms (n,) for tensors that require a gradient and for others."""
        if not torch.is_grad_enabled() or not all(given.requires_grad for given in trained):
            return self._terms(trained, others)
        capture = partial(self._record, self._terms, trained, others)
        replay = self._captures.of(capture_key(*trained, *others), trained[0].device, capture)
        return (replay or self._terms)(trained, others)


@dataclass(frozen=True)
class _TermsRecord:
    """A forward pass from `given` and `beside` to `value`, and its backward pass.

    The latter leads from `value_gradient`, that of `value`, to `given_gradients`, those of `given`.
    """

    given: tuple[Tensor, ...]
    beside: tuple[Tensor, ...]
    value: Tensor
    value_gradient: Tensor
    given_gradients: tuple[Tensor, ...]
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class _Passes(torch.autograd.Function):
    """Both captured passes as a single autograd operation."""

    @staticmethod
    def forward(ctx: Any, record: _TermsRecord, others: Sequence[Tensor], *trained: Tensor) -> Tensor:
        """Replay the forward pass."""
        for kept, new in zip((*record.given, *record.beside), (*trained, *others), strict=True):
            kept.copy_(new)
        record.forward.replay()
        ctx.record = record
        return record.value.clone()  # the next replay overwrites the graph's memory

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Replay the backward pass."""
        record = ctx.record
        record.value_gradient.copy_(gradients[0])
        record.backward.replay()
        return None, None, *(gradient.detach() for gradient in record.given_gradients)


def recorded_terms(
    terms: TermsOfTensors, trained: Sequence[Tensor], others: Sequence[Tensor], place: CapturePlace
) -> TermsOfTensors:
    """Capture the function's forward and backward pass as CUDA graphs for tensors like these.

    Both must have run before, so that their kernels are loaded. They are not run once more on the stream of
    the capture, as the networks are: losses use no library that is set up per stream, and it would take
    their memory twice.

    place: of graphs whose outputs the function may read; nothing of its own is needed after its backward
    pass but the gradients, by the work enqueued next. Raises RuntimeError if something cannot be captured.
    """
    examples = [tensor.detach() for tensor in (*trained, *others)]
    precision = torch.get_autocast_dtype("cuda")
    # Autocast's weight cache must not become part of a graph.
    with torch.autocast("cuda", precision, torch.is_autocast_enabled("cuda"), cache_enabled=False):
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with captured(forward, place):
            # The inputs lie in the graph's own memory, which may be shared with the teacher's pass.
            inputs = [torch.empty_like(tensor) for tensor in examples]
            given = [tensor.requires_grad_() for tensor in inputs[: len(trained)]]
            beside = inputs[len(trained) :]
            value = terms(given, beside)
            value_gradient = torch.zeros_like(value)
        with captured(backward, place):
            given_gradients = torch.autograd.grad(value, given, value_gradient)
    record = _TermsRecord(
        tuple(given), tuple(beside), value.detach(), value_gradient, given_gradients, forward, backward
    )
    return lambda trained, others: cast(Tensor, _Passes.apply(record, others, *trained))
