"""What a GPU does beside other work has the results that it has in turn; a CPU does it in turn."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from benchmarks.step import PROGRESS, Bench
from utils.distillation import distiller
from utils.streams import copied_on_side_stream, joined_side_stream, on_side_stream

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU = torch.device("cpu")


def test_a_cpu_does_all_in_turn():
    values = torch.rand(3)
    with on_side_stream(CPU):
        twice = values * 2
    assert torch.equal(joined_side_stream(CPU, lambda: twice / 2)(), values)
    assert copied_on_side_stream(values, CPU) is values


@needs_cuda
def test_work_beside_sees_what_was_asked_for_before_and_is_seen_afterwards():
    device = torch.device("cuda:0")
    for number in range(20):
        values = torch.full((4096, 4096), float(number), device=device)
        long = values @ values  # keeps the first stream busy
        values = values + long * 0
        with on_side_stream(device):
            other = values * 2
        first = torch.cuda.current_stream()
        values = values @ values
        rest = joined_side_stream(device, lambda other=other: (other + 1, torch.cuda.current_stream()))
        other, stream = rest()
        assert stream != first and torch.cuda.current_stream() == first
        assert float((other - (2 * number + 1)).abs().max()) == 0


@needs_cuda
def test_copies_beside_have_the_values_of_the_batch():
    device, given = (
        torch.device("cuda:0"),
        [torch.full((3, 512, 512), n, dtype=torch.uint8) for n in range(40)],
    )
    sums = []
    for values in given:
        there = copied_on_side_stream(values.pin_memory(), device).float()
        sums.append((there @ there.mT).sum() * 0 + there.sum())
    assert [round(float(x) / (3 * 512 * 512)) for x in sums] == list(range(40))


@needs_cuda
@pytest.mark.parametrize("preset", ["response", "kl", "boxes"])
def test_a_teacher_beside_the_student_says_what_it_says_before_it(monkeypatch, preset):
    bench, values = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cuda:0")), []
    for beside in (False, True):
        with monkeypatch.context() as patched:
            if not beside:
                patched.setattr(distiller, "on_side_stream", lambda _: nullcontext())
                patched.setattr(distiller, "joined_side_stream", lambda _, work: work)
            trainer = bench.with_cuda_graphs(bench.trainer(distill_loss=preset))
            trainer.schedule = replace(trainer.schedule, nominal_batch=10**6)  # no update
            step = bench.step(trainer)
            for _ in range(12):
                step()
            batch = bench.batch.to(bench.device).to_float()
            values.append({k: float(v.detach()) for k, v in trainer.run_batch(batch, PROGRESS).items()})
    assert values[0]["distill_box"] > 0
    assert values[0] == pytest.approx(values[1], rel=0.02, abs=1e-4)
