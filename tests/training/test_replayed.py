"""Teachers' forward passes that are recorded: the same maps, for batches of the recorded shape alone."""

from dataclasses import replace

import pytest
import torch

from benchmarks.step import PROGRESS, Bench
from utils.batch import Progress
from utils.cuda_graphs.capture import WARM_CALLS, CapturePlace, capture_key
from utils.cuda_graphs.frozen import Replayed, recorded
from utils.distillation.distiller import Distiller
from utils.training.replayed import (
    ReplayedStudent,
    capture_places,
    replay_frozen,
    replay_step,
)

SAMPLED = Progress(0, 0, 100, 100)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def body(images):
    return (images * 2, images + 1)


def recorder(log):
    def record(inner, images):
        log.append(tuple(images.shape))
        return lambda given: tuple(maps + 100 for maps in inner(given))

    return record


def test_a_body_is_recorded_when_it_has_seen_one_shape_for_a_while():
    log = []
    replayed = Replayed(body, pytest.fail, recorder(log))
    images = torch.rand(2, 3, 8, 8)
    for _ in range(WARM_CALLS):
        assert torch.equal(replayed(images)[0], images * 2)
    assert not log
    assert torch.equal(replayed(images)[0], images * 2 + 100)
    torch.testing.assert_close(replayed(images)[1], images + 101)
    assert log == [(2, 3, 8, 8)]


def test_other_batches_are_computed_as_they_come():
    log = []
    replayed = Replayed(body, pytest.fail, recorder(log))
    images = torch.rand(2, 3, 8, 8)
    for _ in range(WARM_CALLS + 1):
        replayed(images)
    for other in (images[:1], images.double(), images.to(memory_format=torch.channels_last)):
        assert torch.equal(replayed(other)[0], other * 2)
    assert torch.equal(replayed(images)[0], images * 2 + 100)
    assert len(log) == 1


def test_the_smaller_last_batch_of_short_epochs_keeps_nothing_from_being_recorded():
    log = []
    replayed = Replayed(body, pytest.fail, recorder(log))
    for _epoch in range(5):
        for count in (4, 4, 1):
            replayed(torch.rand(count, 3, 8, 8))
    assert log == [(4, 3, 8, 8)]


def test_what_cannot_be_recorded_runs_as_it_is_and_is_told_once():
    def failing(_body, _images):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    warnings = []
    replayed = Replayed(body, warnings.append, failing)
    images = torch.rand(2, 3, 8, 8)
    for _ in range(WARM_CALLS + 3):
        assert torch.equal(replayed(images)[0], images * 2)
    assert warnings == [
        "the network's forward pass cannot be recorded (operation not permitted when stream is capturing): "
        "it runs as it is"
    ]


def teacher_of(trainer):
    (distiller,) = [loss for loss in trainer.step.losses if isinstance(loss, Distiller)]
    return distiller.teachers.members[0]


def test_a_cpu_records_nothing():
    bench = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cpu"))
    trainer = bench.with_cuda_graphs(bench.trainer(distill_loss="l2"))
    assert not isinstance(teacher_of(trainer).body, Replayed)
    assert not isinstance(trainer.step.body, ReplayedStudent) and not trainer.persistent_gradients


def test_frozen_teachers_alone_are_replayed():
    bench = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cpu"))
    trainer = bench.trainer(distill_loss="l2")
    replay_frozen(trainer, capture_places(trainer), pytest.fail)
    assert isinstance(teacher_of(trainer).body, Replayed)
    trainer = bench.trainer(distill_loss="l2")
    teacher_of(trainer)._fingerprint = None  # somebody else's, which goes on changing
    replay_frozen(trainer, capture_places(trainer), pytest.fail)
    assert not isinstance(teacher_of(trainer).body, Replayed)


def test_only_teachers_that_a_step_waits_for_take_precedence_on_a_gpu():
    bench = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cpu"))
    for preset, awaited in (("l2", False), ("boxes", True)):
        places = capture_places(bench.trainer(distill_loss=preset))
        assert [place.urgent for place in places] == [False, awaited], preset


def test_nothing_is_recorded_where_batches_have_many_shapes(monkeypatch):
    bench = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cpu"))
    trainer = bench.trainer(distill_loss="l2")
    trainer.device, trainer.fixed_shapes = torch.device("cuda"), False
    replay_step(trainer, (2, 3, 64, 64), pytest.fail)
    assert not isinstance(teacher_of(trainer).body, Replayed)


def test_the_student_is_replayed_in_training_and_for_its_shape_alone():
    bench = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cpu"))
    model, images = bench.student.train(), torch.rand(2, 3, 64, 64)
    key = capture_key(images)
    body = ReplayedStudent(model, lambda given: (given,), key, model.forward_features)
    assert body(images)[0] is images
    assert len(body(images[:1])) == 3
    with torch.no_grad():
        assert len(body(images)) == 3
    model.eval()
    assert len(body(images)) == 3


def test_updates_are_the_same_with_gradients_that_stay():
    bench = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cpu"))
    batch, weights = bench.batch.to_float(), []
    for stays in (False, True):
        trainer = bench.trainer()
        trainer.schedule = replace(trainer.schedule, nominal_batch=4)
        if stays:
            trainer.keep_gradients()
        for number in range(6):  # three updates of two batches each
            trainer.run_batch(batch, replace(PROGRESS, step=PROGRESS.step + number))
        assert trainer.ema.updates == 3
        weights.append(trainer.step.model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value)


@needs_cuda
def test_a_cuda_graph_has_the_maps_of_the_network():
    bench = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cuda:0"))
    trainer = bench.trainer(distill_loss="l2")
    network = teacher_of(trainer).model
    shape = (4, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cuda", trainer.amp_dtype):
        batches = [torch.rand(shape, device="cuda").to(memory_format=torch.channels_last) for _ in range(3)]
        network.forward_features(batches[0])
        replay = recorded(network.forward_features, batches[0], CapturePlace(batches[0].device))
        for images in batches:
            for expected, found in zip(network.forward_features(images), replay(images), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@needs_cuda
def test_a_replayed_student_has_the_gradients_and_statistics_of_the_network(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    bench = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cuda:0"))
    batch, states, gradients = bench.batch.to(bench.device).to_float(), [], []
    for replayed in (False, True):
        trainer = bench.trainer()
        trainer.amp_dtype, trainer.schedule = None, replace(trainer.schedule, nominal_batch=1000)
        before = {name: value.clone() for name, value in trainer.step.model.state_dict().items()}
        if replayed:
            bench.with_cuda_graphs(trainer)
            assert isinstance(trainer.step.body, ReplayedStudent)
        after = trainer.step.model.state_dict()
        assert all(torch.equal(before[name], value) for name, value in after.items())
        for _ in range(3):  # gradients add up over batches
            trainer.run_batch(batch, PROGRESS)
        states.append({name: value.clone() for name, value in trainer.step.model.state_dict().items()})
        gradients.append({name: p.grad.clone() for name, p in trainer.step.model.named_parameters()})
    for expected, found in (states, gradients):
        for name, value in expected.items():
            scale = float(value.float().abs().max())
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3 * scale + 1e-6)


@needs_cuda
def test_a_failing_record_leaves_the_stream_and_the_steps_as_they_were():
    bench = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cuda:0"))
    trainer, warnings = bench.trainer(), []
    forward, before = trainer.step.model.forward_features, torch.cuda.current_stream()

    def waiting(images):
        maps = forward(images)
        float(maps[0].detach().sum())  # no record can wait
        return maps

    trainer.step.body = waiting
    replay_step(trainer, (2, 3, 64, 64), warnings.append)
    assert len(warnings) == 1 and "cannot be recorded" in warnings[0]
    assert trainer.step.body is waiting and torch.cuda.current_stream() == before
    terms = trainer.run_batch(bench.batch.to(bench.device).to_float(), PROGRESS)
    assert all(value.isfinite() for value in terms.values())
    assert torch.rand(3, device="cuda").isfinite().all()


@needs_cuda
def test_a_network_whose_first_maps_are_frozen_is_recorded():
    bench = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cuda:0"))
    gradients = []
    for replayed in (False, True):
        trainer = bench.trainer()
        trainer.amp_dtype, trainer.schedule = None, replace(trainer.schedule, nominal_batch=1000)
        for layer in trainer.step.model.model[:18]:
            layer.requires_grad_(False)
        if replayed:
            replay_step(trainer, (2, 3, 64, 64), pytest.fail)
            assert isinstance(trainer.step.body, ReplayedStudent)
        trainer.run_batch(bench.batch.to(bench.device).to_float(), PROGRESS)
        named = trainer.step.model.named_parameters()
        gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
    assert len(gradients[0]) == len(gradients[1])
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-2, atol=1e-2 * float(value.abs().max()))


@needs_cuda
@pytest.mark.parametrize("preset", ["response", "l2", "boxes"])
def test_losses_of_replayed_networks_are_those_of_the_networks(preset):
    bench = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cuda:0"))
    values = []
    for replayed in (False, True):
        torch.manual_seed(1)  # projections begin alike
        trainer = bench.trainer(distill_loss=preset, feature_loss="cwd")
        for group in trainer.optimizer.param_groups:
            group["lr"] = 0.0  # in bf16 updates would soon lead apart
        if replayed:
            bench.with_cuda_graphs(trainer)
        batch = bench.batch.to(bench.device).to_float()
        trainer.run_batch(batch, SAMPLED)
        terms = [trainer.run_batch(batch, PROGRESS) for _ in range(WARM_CALLS + 3)]
        values.append([{name: float(value.detach()) for name, value in term.items()} for term in terms])
    for expected, found in zip(*values, strict=True):
        assert expected["distill_box"] > 0
        assert found == pytest.approx(expected, rel=0.02, abs=1e-4)
