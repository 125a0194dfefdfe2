"""The host never waits for the device within a step: a GPU would stand still meanwhile."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from benchmarks.step import PROGRESS, Bench
from tests.training.presets import PRESETS, SAMPLED
from utils.cuda_graphs.capture import WARM_CALLS
from utils.losses import detection
from utils.training.loop import EpochHooks

# What reads a value back, or has a result of a size that only the values tell.
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "bincount",
}


class WaitedError(AssertionError):
    """An operation that would wait for a GPU."""


class NothingWaits(TorchDispatchMode):
    """Raises WaitedError at operations for which a host waits, except while `in_main_memory`.

    It finds what reads from the device. That nothing is sent there by a copy that waits, only a GPU shows.
    """

    def __init__(self):
        super().__init__()
        self.in_main_memory = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        indices = args[1] if name in {"index", "index_put", "index_put_", "_index_put_impl_"} else ()
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if (name in WAITS or by_mask) and not self.in_main_memory:
            raise WaitedError(f"{name} within a step")
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def bench():
    return Bench("demo-student", "demo-teacher", 64, 2, torch.device("cpu"))


def watched(monkeypatch, bench):
    """A mode that lets targets be assigned as they are for a GPU as well: in main memory, before the rest."""
    mode, assign = NothingWaits(), detection.assign_targets

    def assign_in_main_memory(targets, *others):
        assert targets is bench.batch.targets and targets.device.type == "cpu"
        mode.in_main_memory = True
        try:
            return assign(targets, *others)
        finally:
            mode.in_main_memory = False

    monkeypatch.setattr(detection, "assign_targets", assign_in_main_memory)
    for name in ("tolist", "numpy", "cpu"):  # without an operation where the values are in main memory
        monkeypatch.setattr(torch.Tensor, name, waiting_method(mode, name))
    return mode


def waiting_method(mode, name):
    own = getattr(torch.Tensor, name)

    def method(self, *args, **kwargs):
        if not mode.in_main_memory:
            raise WaitedError(f"{name} within a step")
        return own(self, *args, **kwargs)

    return method


@pytest.mark.parametrize("preset", PRESETS)
def test_no_operation_of_a_step_reads_a_value_back(monkeypatch, bench, preset):
    trainer = bench.trainer(**PRESETS[preset])
    trainer.run_batch(bench.batch.to_float(), SAMPLED)
    with watched(monkeypatch, bench):
        for progress in (SAMPLED, PROGRESS):
            terms = trainer.run_batch(bench.batch.to_float(), progress)
            trainer.meters.update(terms)
            trainer.guard.restore_buffers()
    assert trainer.ema.updates == 3


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: float(x.sum()),
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: (x > 0).nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.where(x > 0),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.clone().index_put_((x > 0,), torch.zeros(())),
    ],
)
def test_what_would_wait_is_found(waiting):
    with NothingWaits(), pytest.raises(WaitedError):
        waiting(torch.rand(4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preset", PRESETS)
def test_no_step_waits_for_a_cuda_device(preset):
    cuda = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cuda:0"))
    trainer = cuda.with_cuda_graphs(cuda.trainer(**PRESETS[preset]))
    step = cuda.step(trainer)
    trainer.run_batch(cuda.batch.to(cuda.device).to_float(), SAMPLED)
    for _ in range(WARM_CALLS + 1):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.meters.update(step())
            trainer.guard.restore_buffers()
        trainer.run_batch(cuda.batch.to(cuda.device).to_float(), SAMPLED)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Batches(list):
    """A loader of the same batch, so many times."""

    def set_epoch(self, epoch, skip):
        pass


def epoch_between(bench, begin, end):
    """Runs an epoch with two looks at the device; calls `begin` after some steps, `end` before the last."""
    trainer, steps = bench.with_cuda_graphs(bench.trainer(distill_loss="response")), 24
    trainer.guard.interval = 10

    def before(_batch, progress):
        if progress.step == WARM_CALLS + 2:
            begin()
        elif progress.step == steps - 1:
            end()

    batches = Batches([bench.batch] * steps)
    return trainer.run_epoch(batches, 0, 1, lambda loader, _: tqdm(loader, disable=True), EpochHooks(before))


def test_an_epoch_shows_its_means(bench):
    called = []
    means = epoch_between(bench, lambda: called.append("begin"), lambda: called.append("end"))
    assert called == ["begin", "end"] and means["box"] > 0 and means["distill_box"] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_part_of_an_epoch_waits_for_a_cuda_device():
    cuda = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cuda:0"))
    try:
        epoch_between(
            cuda,
            lambda: torch.cuda.set_sync_debug_mode("error"),
            lambda: torch.cuda.set_sync_debug_mode("default"),
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
