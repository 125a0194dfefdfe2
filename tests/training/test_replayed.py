"""Teachers' forward passes that are recorded: the same maps, for batches of the recorded shape alone."""

import pytest
import torch

from benchmarks.step import PROGRESS, Bench
from utils.batch import Progress
from utils.distillation.distiller import Distiller
from utils.training.replayed import WARM_CALLS, Replayed, recorded, replay_frozen

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


def test_a_shape_that_changes_is_never_recorded():
    log = []
    replayed = Replayed(body, pytest.fail, recorder(log))
    for number in range(20):
        replayed(torch.rand(1 + number % 2, 3, 8, 8))
    assert not log


def test_what_cannot_be_recorded_runs_as_it_is_and_is_told_once():
    def failing(_body, _images):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    warnings = []
    replayed = Replayed(body, warnings.append, failing)
    images = torch.rand(2, 3, 8, 8)
    for _ in range(WARM_CALLS + 3):
        assert torch.equal(replayed(images)[0], images * 2)
    assert warnings == [
        "the teacher's forward pass cannot be recorded (operation not permitted when stream is capturing): "
        "it runs as it is"
    ]


def test_no_memory_for_a_record_ends_the_run():
    def failing(_body, _images):
        raise torch.OutOfMemoryError("no memory")

    replayed = Replayed(body, pytest.fail, failing)
    with pytest.raises(torch.OutOfMemoryError):
        for _ in range(WARM_CALLS + 1):
            replayed(torch.rand(2, 3, 8, 8))


def teacher_of(trainer):
    (distiller,) = [loss for loss in trainer.step.losses if isinstance(loss, Distiller)]
    return distiller.teachers.members[0]


def test_a_cpu_records_nothing():
    bench = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cpu"))
    trainer = bench.trainer(distill_loss="l2")
    replay_frozen(trainer, pytest.fail)
    assert not isinstance(teacher_of(trainer).body, Replayed)


def test_frozen_teachers_alone_are_replayed():
    bench = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cpu"))
    trainer = bench.trainer(distill_loss="l2")
    trainer.device = torch.device("cuda")
    trainer.fixed_shapes = False
    replay_frozen(trainer, pytest.fail)
    assert not isinstance(teacher_of(trainer).body, Replayed)
    trainer.fixed_shapes = True
    replay_frozen(trainer, pytest.fail)
    assert isinstance(teacher_of(trainer).body, Replayed)

    trainer = bench.trainer(distill_loss="l2")
    teacher_of(trainer)._fingerprint = None  # somebody else's, which goes on changing
    trainer.device = torch.device("cuda")
    replay_frozen(trainer, pytest.fail)
    assert not isinstance(teacher_of(trainer).body, Replayed)


@needs_cuda
def test_a_cuda_graph_has_the_maps_of_the_network():
    bench = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cuda:0"))
    trainer = bench.trainer(distill_loss="l2")
    network = teacher_of(trainer).model
    shape = (4, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cuda", trainer.amp_dtype):
        batches = [torch.rand(shape, device="cuda").to(memory_format=torch.channels_last) for _ in range(3)]
        network.forward_features(batches[0])
        replay = recorded(network.forward_features, batches[0])
        for images in batches:
            for expected, found in zip(network.forward_features(images), replay(images), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@needs_cuda
def test_losses_under_a_replayed_teacher_are_those_under_the_teacher():
    bench = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cuda:0"))
    values = []
    for replayed in (False, True):
        trainer = bench.trainer(distill_loss="response", feature_loss="cwd")
        if replayed:
            bench.hastened(trainer)
        batch = bench.batch.to(bench.device).to_float()
        trainer.run_batch(batch, SAMPLED)
        terms = [trainer.run_batch(batch, PROGRESS) for _ in range(WARM_CALLS + 3)]
        values.append([{name: float(value.detach()) for name, value in term.items()} for term in terms])
    for expected, found in zip(*values, strict=True):
        assert found == pytest.approx(expected, rel=0.05, abs=1e-3)
