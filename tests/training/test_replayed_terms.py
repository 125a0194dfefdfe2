"""Losses that are recorded: the same terms and gradients, for the tensors of the recorded kinds alone."""

from dataclasses import replace

import pytest
import torch

from benchmarks.step import PROGRESS, Bench
from utils.batch import Progress, StudentOutput
from utils.cuda_graphs.capture import WARM_CALLS, CapturePlace
from utils.losses.assignment import assign_targets
from utils.training.replayed import capture_places, replay_frozen, replay_losses
from utils.training.replayed_terms import MAX_CAPTURES, ReplayedTerms, recorded_terms

SAMPLED = Progress(0, 0, 100, 100)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PRESETS = ("response", "l2", "kl", "objectness")


def terms(trained, others):
    return torch.stack(((trained[0] * others[0]).sum(), (trained[1] ** 2).sum()))


def recorder(log):
    def record(inner, trained, others):
        log.append(tuple(len(given) for given in (*trained, *others)))
        return lambda *given: inner(*given) + 100

    return record


def tensors(*lengths):
    return [torch.rand(n, requires_grad=True) for n in lengths[:2]], [torch.rand(lengths[2])]


def test_kinds_that_are_seen_for_a_while_are_recorded_and_no_more_than_a_few():
    log = []
    replayed = ReplayedTerms(terms, pytest.fail, recorder(log))
    for size in range(1, MAX_CAPTURES + 3):
        given = tensors(size, 3, size)
        for _ in range(WARM_CALLS):
            assert torch.equal(replayed(*given), terms(*given))
        extra = 100 if size <= MAX_CAPTURES else 0
        assert torch.equal(replayed(*given), terms(*given) + extra)
    assert log == [(size, 3, size) for size in range(1, MAX_CAPTURES + 1)]


def test_what_takes_no_gradient_is_worked_out_as_it_comes():
    log = []
    replayed, given = ReplayedTerms(terms, pytest.fail, recorder(log)), tensors(2, 3, 2)
    for _ in range(WARM_CALLS + 2):
        replayed(*given)
    with torch.no_grad():
        assert torch.equal(replayed(*given), terms(*given))
    fixed = [given[0][0].detach(), given[0][1]]
    assert torch.equal(replayed(fixed, given[1]), terms(fixed, given[1]))
    assert len(log) == 1


def test_what_cannot_be_recorded_is_worked_out_as_it_comes_and_is_told_once():
    def failing(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    warnings = []
    replayed = ReplayedTerms(terms, warnings.append, failing)
    for size in (2, 3):
        given = tensors(size, 3, size)
        for _ in range(WARM_CALLS + 3):
            assert torch.equal(replayed(*given), terms(*given))
    assert warnings == [
        "a loss cannot be recorded (operation not permitted when stream is capturing): it runs as it is"
    ]


@pytest.mark.parametrize("count", [0, 1, 37, 900])
def test_padded_pairs_are_the_pairs_and_others_that_are_not_real(count):
    torch.manual_seed(count)
    targets = torch.rand(count, 6)
    targets[:, 0], targets[:, 1] = torch.arange(count) % 4, torch.arange(count) % 5
    anchors = torch.tensor([[[1.2, 2.0], [3.0, 2.5]], [[2.0, 2.0], [1.0, 4.0]]])
    found = assign_targets(targets, anchors, [(16, 20), (8, 10)], 4.0)
    padded, real = found.padded(least=8)
    width = padded.counts[0]
    assert padded.counts == (width, width) and width & (width - 1) == 0 and width >= max(*found.counts, 8)
    kept = real.bool()
    assert int(kept.sum()) == len(found)
    assert torch.equal(padded.indices()[:, kept], found.indices()) and torch.equal(
        padded.boxes[kept], found.boxes
    )
    assert not padded.indices()[:, ~kept].any()


class Watched:
    """Stands for a record: counts its calls."""

    calls = 0

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, *given):
        Watched.calls += 1
        return self.inner(*given)


@pytest.mark.parametrize(
    ("preset", "gains", "classes"),
    [
        (None, {}, 20),
        (None, {"fl_gamma": 1.5, "label_smoothing": 0.1, "cls_pw": 0.7}, 20),
        (None, {}, 1),
        *((preset, {}, 20) for preset in (*PRESETS, "boxes")),
    ],
)
def test_losses_on_their_tensors_alone_have_the_same_terms_and_gradients(preset, gains, classes):
    bench = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cpu"), classes)
    batch = replace(bench.batch.to_float(), labelled=torch.tensor([True, False]))
    options = {"distill_loss": preset} if preset else {}
    found = []
    for replayed in (False, True):
        trainer = bench.trainer(**options)
        detection = trainer.step.losses[0]
        detection.gains = replace(detection.gains, **gains)
        if replayed:
            for loss in trainer.step.losses:
                loss.replay_terms(Watched)
        trainer.schedule = replace(trainer.schedule, nominal_batch=10**6)
        before = Watched.calls
        values = [trainer.run_batch(batch, progress) for progress in (SAMPLED, PROGRESS)]
        assert Watched.calls - before == (2 * len(trainer.step.losses) if replayed else 0)
        gradients = [p.grad for p in trainer.step.parameters() if p.grad is not None]
        found.append((values, gradients))
    for expected, other in zip(*(values for values, _ in found), strict=True):
        assert {k: float(v.detach()) for k, v in other.items()} == pytest.approx(
            {k: float(v.detach()) for k, v in expected.items()}, rel=1e-4
        )
    for expected, other in zip(*(gradients for _, gradients in found), strict=True):
        assert float((other - expected).norm()) <= 1e-3 * float(expected.norm()) + 1e-7


def test_a_validation_is_not_replayed():
    bench = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cpu"))
    loss = bench.trainer().step.losses[0]
    loss.replay_terms(lambda _: pytest.fail)
    loss.eval()
    batch, student = bench.batch.to_float(), bench.student
    features = student.forward_features(batch.images)
    values = loss(batch, StudentOutput(features, student.forward_head(features)), PROGRESS)
    assert float(values["box"].detach()) > 0


def test_pairs_that_are_not_real_read_nothing():
    """They point to the first cell, whose outputs may be no numbers while nothing asks for them."""
    bench = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cpu"))
    batch = bench.batch.to_float()
    batch = replace(batch, targets=batch.targets[batch.targets[:, 0] == 1])
    features = bench.student.forward_features(batch.images)
    levels = [level.detach() for level in bench.student.forward_head(features)]
    levels[0][0, 0, 0, 0, :4], levels[0][0, 0, 0, 0, 5:] = torch.nan, torch.inf
    loss = bench.trainer().step.losses[0]
    expected = loss(batch, StudentOutput((), levels), PROGRESS)
    loss.replay_terms(Watched)
    assert all(value.isfinite() for value in expected.values())
    torch.testing.assert_close(loss(batch, StudentOutput((), levels), PROGRESS), expected)


def test_the_benchmarks_teacher_sees_objects():
    bench = Bench("demo-student", "demo-teacher", 64, 2, torch.device("cpu"))
    terms = bench.trainer(distill_loss="boxes").run_batch(bench.batch.to_float(), PROGRESS)
    assert terms["distill_box"] > 0 and terms["distill_cls"] > 0


@needs_cuda
def test_recorded_terms_have_values_and_gradients_of_the_function():
    function = lambda a, b: torch.stack(((a[0].float().sigmoid() * b[0]).sum(), (a[0].float() ** 2).mean()))  # noqa: E731
    first = torch.rand(4, 5, device="cuda").to(torch.bfloat16).requires_grad_()
    beside = [torch.rand(4, 5, device="cuda")]
    function([first], beside).sum().backward()  # loads the kernels
    record = recorded_terms(function, [first], beside, CapturePlace(first.device))
    for weight in (1.0, 3.0):
        given = torch.randn(4, 5, device="cuda").to(torch.bfloat16).requires_grad_()
        beside, value_gradient = torch.rand(4, 5, device="cuda"), torch.tensor([weight, 0.5], device="cuda")
        expected, found = function([given], [beside]), record([given], [beside])
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(value, given, value_gradient)[0] for value in (expected, found)]
        torch.testing.assert_close(gradients[1], gradients[0])


@needs_cuda
@pytest.mark.parametrize("features", ["none", "cwd"])
@pytest.mark.parametrize("preset", [None, *PRESETS, "boxes"])
def test_recorded_losses_have_the_terms_and_gradients_of_the_losses(preset, features):
    bench = Bench("demo-student", "demo-teacher", 64, 4, torch.device("cuda:0"))
    options = {"distill_loss": preset, "feature_loss": features} if preset else {}
    generator, found = torch.Generator().manual_seed(0), []
    batches = []
    for count in (12, 3, 30, 12, 0, 70, 12, 12, 5, 30, 30, 30, 12, 30):  # pairs of several kinds
        targets = torch.rand(4 * count, 6, generator=generator)
        targets[:, 0], targets[:, 1] = torch.arange(4).repeat_interleave(count), torch.arange(4 * count) % 20
        batches.append(replace(bench.batch, targets=targets).to(bench.device).to_float())
    # The last batch of an epoch is smaller; what is recorded must not lose anything to it.
    first = targets[targets[:, 0] == 0]
    small = replace(batches[0], images=batches[0].images[:1], labelled=batches[0].labelled[:1], targets=first)
    batches[-2:-2] = [small]
    for replayed in (False, True):
        torch.manual_seed(1)  # the projections of features are random
        trainer = bench.trainer(**options)
        trainer.schedule = replace(trainer.schedule, nominal_batch=10**6)
        if replayed:
            # In the memory of the teacher's pass, whose maps must remain for what comes after the terms.
            places = capture_places(trainer)
            replay_frozen(trainer, places, pytest.fail)
            replay_losses(trainer, places, pytest.fail)
        values = []
        for number, batch in enumerate(batches):
            values.append(trainer.run_batch(batch, SAMPLED if number % 5 == 4 else PROGRESS))
        if replayed:
            others = [] if preset is None else [trainer.step.losses[1].preset]
            records = [len(loss._replayed._captures.made) for loss in (trainer.step.losses[0], *others)]
            assert records == [2, 1][: len(records)]
        gradients = [p.grad for p in trainer.step.parameters() if p.grad is not None]
        found.append(([{k: float(v.detach()) for k, v in value.items()} for value in values], gradients))
    for expected, other in zip(*(values for values, _ in found), strict=True):
        assert other == pytest.approx(expected, rel=0.01, abs=1e-4, nan_ok=True)
    for expected, other in zip(*(gradients for _, gradients in found), strict=True):
        assert float((other - expected).norm()) <= 0.05 * float(expected.norm()) + 1e-4
