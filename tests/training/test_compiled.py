"""`--compile`: the same losses and files, and a run that goes on where it fails."""

import copy
import shutil

import pytest
import torch

from models.yolo import Model
from utils.batch import Batch, Progress
from utils.distillation.distiller import Distiller
from utils.distillation.ensemble import Teachers
from utils.distillation.presets import DenseOutputs
from utils.distillation.teacher import Teacher
from utils.errors import StoppedError
from utils.losses.detection import DetectionLoss, LossGains
from utils.training import compiled
from utils.training.compiled import Compiler, compile_step
from utils.training.ema import ModelEma
from utils.training.guard import StepGuard
from utils.training.loop import Trainer
from utils.training.optimizer import RateSchedule, build_optimizer
from utils.training.step import TrainingStep

TINY = {
    "nc": 2,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "anchors": [[8, 8, 16, 16]],
    "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]]],
    "head": [[[1], 1, "Detect", ["nc", "anchors"]]],
}


def tiny(seed):
    torch.manual_seed(seed)
    return Model(copy.deepcopy(TINY)).to(memory_format=torch.channels_last)


def batch_of(images=2, side=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(images, 3, side, side, generator=generator).to(memory_format=torch.channels_last)
    targets = torch.tensor([[i, i % 2, 0.5, 0.4, 0.4, 0.3] for i in range(images)])
    return Batch(pixels, targets, torch.ones(images, dtype=torch.bool))


def distilling_trainer():
    student = tiny(0)
    detection = DetectionLoss(student.head.anchors, 2, LossGains())
    teachers = Teachers([Teacher(tiny(1).eval())], student, student.names)
    step = TrainingStep(student, [detection, Distiller(teachers, DenseOutputs(LossGains(), "l2", 1.0), 1.0)])
    optimizer = build_optimizer([step], "SGD", rate=0.01, momentum=0.9, weight_decay=0.0)
    ema = ModelEma(student)
    return Trainer(
        step, optimizer, RateSchedule(0.01, 1.0, False, 0.9, 0, 0.9, 0.1, 64), ema, torch.device("cpu"),
        torch.amp.GradScaler("cpu", init_scale=1.0), StepGuard([student, ema.model]),
    )  # fmt: skip


def losses_of(trainer, batches):
    trainer.step.train()
    done = [trainer.run_batch(batch, Progress(n + 1, 0, 100, 1)) for n, batch in enumerate(batches)]
    return [{name: float(value.detach()) for name, value in terms.items()} for terms in done]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_steps_have_the_losses_and_tensors_of_plain_ones(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plain, fast, warnings = distilling_trainer(), distilling_trainer(), []
    # The second size is another one: it is compiled for sizes of every kind.
    batches = [batch_of(seed=0), batch_of(seed=1), batch_of(seed=2)]
    before = copy.deepcopy(fast.step.state_dict())
    compile_step(fast.step, Compiler(warnings.append), batches[0].images, None)
    after = fast.step.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before if torch.is_tensor(before[name]))
    expected, found = losses_of(plain, batches), losses_of(fast, batches)
    assert warnings == []
    for one, other in zip(expected, found, strict=True):
        # Sums in another order, three updates on: the sixth digit.
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
    assert list(plain.step.model.state_dict()) == list(fast.step.model.state_dict())
    assert list(plain.ema.model.state_dict()) == list(fast.ema.model.state_dict())
    for name, value in plain.step.model.state_dict().items():
        torch.testing.assert_close(fast.step.model.state_dict()[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.fault(
    "`torch.compile` fails, at the start or later",
    "one warning; the run continues without `--compile`, with the losses of a plain run",
)
@pytest.mark.parametrize("failing_call", [1, 3])
def test_a_failure_is_told_once_and_the_losses_are_those_of_a_plain_run(monkeypatch, failing_call):
    calls = []

    def broken(body, **_):
        def run(images):
            calls.append(images.shape)
            if len(calls) >= failing_call:
                raise RuntimeError("no kernel for this\nand more lines")
            return body(images)

        return run

    monkeypatch.setattr(compiled.torch, "compile", broken)
    plain, fast, warnings = distilling_trainer(), distilling_trainer(), []
    compile_step(fast.step, Compiler(warnings.append), batch_of().images, None)
    batches = [batch_of(seed=n) for n in range(3)]
    assert losses_of(fast, batches) == losses_of(plain, batches)
    assert warnings == ["--compile has failed (no kernel for this): going on without it"]
    assert len(calls) == failing_call


def test_a_run_that_begins_with_a_smaller_batch_has_kernels_for_the_whole_ones(monkeypatch):
    """As one that goes on before the last batch of an epoch does."""
    shapes = []

    def noted(body, **_):
        def run(images):
            shapes.append(tuple(images.shape))
            return body(images)

        return run

    monkeypatch.setattr(compiled.torch, "compile", noted)
    trainer = distilling_trainer()
    compile_step(trainer.step, Compiler(pytest.fail), batch_of().images, None)
    whole = (2, 3, 32, 32)
    assert shapes == [whole, whole]  # the teacher and the student
    losses_of(trainer, [batch_of(1), batch_of(2), batch_of(1)])
    assert shapes == [whole] * 4


def test_a_mistake_that_is_no_failure_to_compile_comes_through(monkeypatch):
    monkeypatch.setattr(compiled.torch, "compile", lambda body, **_: body)
    trainer, warnings = distilling_trainer(), []
    compile_step(trainer.step, Compiler(warnings.append), batch_of().images, None)
    with pytest.raises(RuntimeError, match="channels"):
        trainer.step.body(torch.zeros(1, 5, 32, 32))
    assert warnings == []


def test_a_signal_while_it_compiles_is_no_failure(monkeypatch):
    def stopped(*_, **__):
        try:
            raise StoppedError(15)
        except StoppedError as error:
            raise RuntimeError("compiling failed") from error

    monkeypatch.setattr(compiled.torch, "compile", lambda body, **_: stopped)
    with pytest.raises(StoppedError):
        Compiler(pytest.fail)(tiny(0).forward_features)(batch_of().images)


def test_trying_leaves_weights_gradients_and_statistics_as_they_were(monkeypatch):
    monkeypatch.setattr(compiled.torch, "compile", lambda body, **_: body)
    trainer = distilling_trainer()
    trainer.step.eval()
    before = copy.deepcopy(trainer.step.model.state_dict())
    compile_step(trainer.step, Compiler(print), batch_of().images, None)
    assert all(torch.equal(before[name], value) for name, value in trainer.step.model.state_dict().items())
    assert not trainer.step.model.training
    assert all(parameter.grad is None for parameter in trainer.step.parameters())
