"""The step and the loop on a toy network: what is summed, measured, clipped and stopped."""

import copy
import itertools

import pytest
import torch
from torch import nn

from utils.batch import Batch, Progress
from utils.errors import UserError
from utils.training import guard as guard_module
from utils.training.delayed_read import DelayedRead
from utils.training.ema import ModelEma
from utils.training.guard import MAX_CONSECUTIVE_SKIPS, StepGuard
from utils.training.loop import EpochHooks, Meters, MultiScale, Trainer
from utils.training.optimizer import RateSchedule, build_optimizer
from utils.training.state import RunState, read_state, restore, save_state
from utils.training.step import TrainingStep


class Head(nn.Module):
    """As much of a Detect layer as a step asks for."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 2, 1)

    def input_gradient(self, level, slope):
        return torch.nn.functional.conv_transpose2d(slope, self.layer.weight)


class Toy(nn.Module):
    """A network with the two halves of a detector."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1))
        self.head = Head()

    def forward_features(self, images):
        return (self.body(images),)

    def forward_head(self, features):
        return tuple(self.head.layer(feature) for feature in features)


class Square(nn.Module):
    """The weighted mean square of the output."""

    def __init__(self, name, weight):
        super().__init__()
        self.names, self.label, self.weight = (name,), name, weight

    def forward(self, batch, output, progress):
        return {self.names[0]: self.weight * output.levels[0].square().mean()}


def schedule(batch_size=64):
    return RateSchedule(0.1, 1.0, False, 0.9, 0, 0.9, 0.1, batch_size)


def trainer_of(losses, batch_size=64, seed=0, folder=None):
    torch.manual_seed(seed)
    step = TrainingStep(Toy(), losses)
    optimizer = build_optimizer([step], "SGD", rate=0.1, momentum=0.9, weight_decay=0.0)
    scaler, ema = torch.amp.GradScaler("cpu", init_scale=1.0), ModelEma(step.model)
    guard = StepGuard([step.model, ema.model], folder)
    return Trainer(step, optimizer, schedule(batch_size), ema, torch.device("cpu"), scaler, guard)


def batch_of(images=2, seed=0):
    pixels = torch.rand(images, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Batch(pixels, torch.zeros(0, 6), torch.ones(images, dtype=torch.bool))


class Loader:
    """Batches in a list, with the epoch noted."""

    def __init__(self, batches):
        self.batches, self.epoch = batches, None

    def set_epoch(self, epoch, skip=0):
        self.epoch, self.skip = epoch, skip

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches[self.skip :])


class Bar:
    """As much of a progress bar as the loop uses."""

    def __init__(self, loader, done):
        self.loader, self.done = loader, done

    def __iter__(self):
        return iter(self.loader)

    def set_postfix(self, values, refresh):
        self.values = values


def test_terms_of_all_losses_add_up_in_the_gradient():
    both = trainer_of([Square("a", 1.0), Square("b", 2.0)])
    single = trainer_of([Square("c", 3.0)])
    for trainer in (both, single):
        trainer.run_batch(batch_of(), Progress(5, 0, 10, 1))
    for first, second in zip(both.step.model.parameters(), single.step.model.parameters(), strict=True):
        torch.testing.assert_close(first, second)


def test_the_gauge_is_the_ratio_of_the_gradients():
    trainer = trainer_of([Square("a", 1.0), Square("b", 3.0)])
    gauges = trainer.run_batch(batch_of(), Progress(0, 0, 8, 1))
    assert trainer.step.gauges == ("b_grad_ratio",)
    assert float(gauges["b_grad_ratio"]) == pytest.approx(3.0, rel=1e-5)


def test_gauges_are_sampled_four_times_an_epoch_and_never_for_a_single_loss():
    trainer = trainer_of([Square("a", 1.0), Square("b", 3.0)])
    sampled = ["b_grad_ratio" in trainer.run_batch(batch_of(), Progress(n, 0, 12, 1)) for n in range(12)]
    assert sampled == [step % 3 == 0 for step in range(12)]
    assert list(trainer_of([Square("a", 1.0)]).run_batch(batch_of(), Progress(0, 0, 12, 1))) == ["a"]


def test_accumulated_batches_move_the_weights_like_the_sum_of_their_gradients():
    trainer = trainer_of([Square("a", 1.0)], batch_size=32)  # two batches an update
    start = copy.deepcopy(trainer.step.model.state_dict())
    trainer.run_batch(batch_of(seed=1), Progress(0, 0, 10, 1))
    assert all(torch.equal(start[k], v) for k, v in trainer.step.model.state_dict().items())
    trainer.run_batch(batch_of(seed=2), Progress(1, 0, 10, 1))
    assert not all(torch.equal(start[k], v) for k, v in trainer.step.model.state_dict().items())
    assert trainer.ema.updates == 1


def test_an_epoch_gives_means_and_tells_the_loader_which_epoch_it_is():
    trainer = trainer_of([Square("a", 1.0)])
    loader = Loader([batch_of(seed=i) for i in range(3)])
    seen = []
    hooks = EpochHooks(lambda batch, progress: seen.append(progress.step))
    means = trainer.run_epoch(loader, 4, 10, Bar, hooks)
    assert loader.epoch == 4 and seen == [12, 13, 14]
    assert set(means) == {"a"} and means["a"] > 0


def test_an_epoch_goes_on_after_the_batches_that_are_done():
    whole, cut = trainer_of([Square("a", 1.0)]), trainer_of([Square("a", 1.0)])
    batches = [batch_of(seed=i) for i in range(4)]
    expected = whole.run_epoch(Loader(batches), 2, 9, Bar)

    class EnoughError(Exception):
        pass

    def leave(progress):
        if progress.step == 2 * 4 + 1:
            raise EnoughError

    with pytest.raises(EnoughError):
        cut.run_epoch(Loader(batches), 2, 9, Bar, EpochHooks(after=leave))
    assert cut.done == 2
    seen = []
    means = cut.run_epoch(Loader(batches), 2, 9, Bar, EpochHooks(lambda _, at: seen.append(at.step)))
    assert seen == [10, 11] and means == expected
    for first, second in zip(whole.step.model.parameters(), cut.step.model.parameters(), strict=True):
        assert torch.equal(first, second)


class Broken(Square):
    """No number at the steps that are given."""

    def __init__(self, steps):
        super().__init__("a", 1.0)
        self.steps = steps

    def forward(self, batch, output, progress):
        (term,) = super().forward(batch, output, progress).values()
        return {"a": term * float("nan") if progress.step in self.steps else term}


@pytest.mark.fault(
    "a NaN loss",
    "the step is skipped, counted and reported; weights and mean losses are unaffected",
)
def test_a_step_that_is_no_number_is_skipped_counted_and_left_out_of_the_means():
    trainer, warnings = trainer_of([Broken({1})]), []
    weights = []

    def look(progress):
        weights.append(copy.deepcopy(trainer.step.model.state_dict()))

    batches = [batch_of(seed=i) for i in range(3)]
    means = trainer.run_epoch(Loader(batches), 0, 1, Bar, EpochHooks(after=look, warn=warnings.append))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[1][name], weights[2][name]) for name in weights[0])
    assert means["a"] > 0 and len(warnings) == 1 and "step 1" in warnings[0] and "skipped" in warnings[0]
    assert trainer.guard.skipped == 1


@pytest.mark.fault(
    "NaN losses in many consecutive steps",
    "the run ends with a one-line error; the batch is saved in `bad_batch.pt`",
)
def test_many_such_steps_in_a_row_end_the_run_with_the_batch_saved(tmp_path):
    trainer = trainer_of([Broken(set(range(2, 50)))], folder=tmp_path)
    start = copy.deepcopy(trainer.step.model.state_dict())
    with pytest.raises(
        UserError,
        match=rf"step {1 + MAX_CONSECUTIVE_SKIPS}.*{MAX_CONSECUTIVE_SKIPS} updates in a row.*bad_batch\.pt",
    ):
        trainer.run_epoch(Loader([batch_of(seed=i) for i in range(50)]), 0, 1, Bar)
    saved = torch.load(tmp_path / "bad_batch.pt", weights_only=True)
    assert saved["step"] == 1 + MAX_CONSECUTIVE_SKIPS and saved["images"].shape == (2, 3, 8, 8)
    now = trainer.step.model.state_dict()
    assert all(value.isfinite().all() for value in now.values())
    assert any(not torch.equal(start[name], value) for name, value in now.items())  # by the first two steps


def test_each_of_several_processes_saves_its_own_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(guard_module, "rank", lambda: 1)
    trainer = trainer_of([Broken(set(range(50)))], folder=tmp_path)
    with pytest.raises(UserError, match=r"bad_batch_1\.pt"):
        trainer.run_epoch(Loader([batch_of(seed=i) for i in range(50)]), 0, 1, Bar)
    assert [path.name for path in tmp_path.iterdir()] == ["bad_batch_1.pt"]


@pytest.mark.fault(
    "a batch that puts NaN into BatchNorm statistics",
    "the statistics are restored to their values before the batch",
)
def test_statistics_of_batch_norms_that_a_broken_batch_has_spoilt_are_put_back():
    norm = nn.BatchNorm2d(2)
    guard = StepGuard([norm], interval=10)
    norm(torch.rand(4, 2, 3, 3))
    guard.record_norm(torch.tensor(1.0))
    guard.check(batch_of(), Progress(0, 0, 9, 1), {})
    good = norm.running_mean.clone()
    norm(torch.full((4, 2, 3, 3), float("nan")))
    guard.record_norm(torch.tensor(float("nan")))
    assert guard.check(batch_of(), Progress(5, 0, 9, 1), {}) is None  # not looked at yet
    assert "skipped" in guard.check(batch_of(), Progress(10, 0, 9, 1), {})
    assert torch.equal(norm.running_mean, good) and norm.running_var.isfinite().all()


@pytest.mark.parametrize("late", [False, True], ids=["at once", "a check later"])
def test_each_skipped_update_is_told_once_however_late_the_counts_arrive(late):
    guard, told = StepGuard([], interval=10), []
    if late:
        guard._delayed_counts = DelayedRead(lambda value: (value.clone(), lambda: True))
    for step in range(60):
        guard.record_norm(torch.tensor(float("nan") if step in (0, 11, 32) else 1.0))
        warning = guard.check(batch_of(), Progress(step, 0, 60, 1), {})
        if warning is not None:
            told.append((step, warning.split("(")[1]))
    # After a warning each step is looked at, until one was good.
    steps = (10, 11, 50) if late else (0, 20, 40)
    assert told == [(step, f"{number} so far)") for number, step in enumerate(steps, 1)]


def test_what_a_restored_state_brought_is_what_a_broken_batch_is_mended_with():
    norm, other = nn.BatchNorm2d(2), StepGuard([nn.BatchNorm2d(2)])
    guard = StepGuard([norm])
    for value in (1.0, float("nan"), float("nan")):
        other.record_norm(torch.tensor(value))
    other.check(batch_of(), Progress(0, 0, 9, 1), {})
    norm.running_mean.fill_(7.0)
    guard.load_state_dict(other.state_dict())
    norm(torch.full((4, 2, 3, 3), float("nan")))
    guard.record_norm(torch.tensor(float("nan")))
    assert "skipped (3 so far)" in guard.check(batch_of(), Progress(0, 0, 9, 1), {})
    assert norm.running_mean.tolist() == [7.0, 7.0]
    assert guard.state_dict() == {"skipped": 3, "in_row": 3, "told": 3}


def with_norm(**given):
    """A trainer of two batches an update whose network has a batch norm."""
    trainer = trainer_of([Square("a", 1.0)], batch_size=32, **given)
    trainer.step.model.body.append(nn.BatchNorm2d(4))
    trainer.ema = ModelEma(trainer.step.model)
    trainer.guard = StepGuard([trainer.step.model, trainer.ema.model], interval=10)
    return trainer


@pytest.mark.fault(
    "NaN in one of the batches of an update (gradient accumulation)",
    "the update is skipped; BatchNorm statistics, also of the EMA, stay finite after every step",
)
@pytest.mark.parametrize("broken", [2, 3])
def test_a_broken_batch_among_those_of_an_update_leaves_no_trace_in_statistics(broken):
    trainer = with_norm()
    batches, finite, warnings = [batch_of(seed=i) for i in range(12)], [], []
    batches[broken].images[0, 0, 0, 0] = float("nan")

    def look(_progress):
        values = (*trainer.step.model.state_dict().values(), *trainer.ema.model.state_dict().values())
        finite.append(all(bool(value.isfinite().all()) for value in values))

    trainer.run_epoch(Loader(batches), 0, 1, Bar, EpochHooks(after=look, warn=warnings.append))
    assert finite == [True] * 12
    assert len(warnings) == 1 and trainer.guard.skipped == 1
    assert float(trainer.step.model.body[1].running_mean.abs().max()) > 0


def in_float16():
    """A trainer of two batches an update with a loss scale, as float16 has it on a GPU."""
    trainer = trainer_of([Broken({4, 5})], batch_size=32)
    trainer.amp_dtype = torch.float16
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=3)
    return trainer


@pytest.mark.parametrize("persistent", [False, True])
def test_the_loss_scale_goes_on_with_a_run(tmp_path, persistent):
    """Stopped between two batches of an update, after a skipped one has halved the scale."""
    whole, cut, other = in_float16(), in_float16(), in_float16()
    other.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    batches = [batch_of(seed=i) for i in range(16)]

    class EnoughError(Exception):
        pass

    def leave(progress):
        if progress.step == 8:
            raise EnoughError

    whole.run_epoch(Loader(batches), 0, 1, Bar)
    with pytest.raises(EnoughError):
        cut.run_epoch(Loader(batches), 0, 1, Bar, EpochHooks(after=leave))
    run = RunState(0, 0.0, 0, [], "TrainOptions", {}, {}, [], {}, "")
    save_state(tmp_path / "state.pt", run, cut)
    if persistent:  # in the memory that a CUDA graph, or an exchange between ranks, knows
        other.keep_gradients()
    kept = [parameter.grad for parameter in other.step.model.parameters()]
    restore(read_state(tmp_path / "state.pt"), other)
    if persistent:
        assert all(p.grad is own for p, own in zip(other.step.model.parameters(), kept, strict=True))
    assert other.pending == 1 and other.scaler.get_scale() == 2.0**5
    assert other.scaler.state_dict() == cut.scaler.state_dict() and other.scaler._get_growth_tracker() == 1
    other.run_epoch(Loader(batches), 0, 1, Bar)
    assert other.scaler.state_dict() == whole.scaler.state_dict() and whole.scaler.get_scale() > 2.0**5
    for first, second in zip(whole.step.model.parameters(), other.step.model.parameters(), strict=True):
        assert torch.equal(first, second)
    assert other.guard.state_dict() == whole.guard.state_dict()


class Watched(Loader):
    """A loader that looks at the trainer whenever it is asked for a batch."""

    def __init__(self, batches, look):
        super().__init__(batches)
        self.look = look

    def __iter__(self):
        for batch in super().__iter__():
            self.look("loader")
            yield batch


@pytest.mark.parametrize("broken", ["terms", "run_batch", "update", "means"])
def test_a_state_is_whole_between_two_steps_and_in_none_of_them(broken, monkeypatch):
    """Two batches an update; in the fourth there is an error after a part of what makes up a step."""
    trainer, seen = trainer_of([Square("a", 1.0)], batch_size=32), []

    def look(place):
        seen.append((place, trainer.done, trainer.between_steps))

    def failing(real):
        def disturbed(*args, **kwargs):
            look(broken)
            result = real(*args, **kwargs)
            if trainer.done == 3:
                raise RuntimeError("[gloo/transport] Connection closed")
            return result

        return disturbed

    others = {"terms": (trainer.step, "forward"), "means": (trainer.meters, "update")}
    owner, name = others.get(broken, (trainer, broken))
    monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    loader = Watched([batch_of(seed=i) for i in range(6)], look)
    hooks = EpochHooks(lambda *_: look("before"), lambda *_: look("after"))
    with pytest.raises(RuntimeError, match="gloo"):
        trainer.run_epoch(loader, 0, 1, Bar, hooks)
    inside = {1, 3} if broken == "update" else {0, 1, 2, 3}
    outside = [("loader", 0), ("before", 0), ("after", 1)]
    assert {entry for entry in seen if not entry[2]} == {(broken, done, False) for done in inside}
    wanted = [(place, done + steps, True) for steps in range(4) for place, done in outside]
    assert [entry for entry in seen if entry[2]] == wanted[:-1]
    assert not trainer.between_steps


def test_the_time_of_an_epoch_that_was_cut_counts_from_its_begin(tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("utils.training.loop.time.monotonic", lambda: next(clock))
    cut, other = trainer_of([Square("a", 1.0)]), trainer_of([Square("a", 1.0)])
    batches = [batch_of(seed=i) for i in range(5)]
    cut.run_epoch(Loader(batches[:3]), 0, 1, Bar)
    save_state(tmp_path / "state.pt", RunState(0, 0.0, 0, [], "TrainOptions", {}, {}, [], {}, ""), cut)
    next(clock)  # while nothing runs
    restore(read_state(tmp_path / "state.pt"), other)
    assert other.seconds == 3  # one a batch
    other.run_epoch(Loader(batches), 0, 1, Bar)
    assert (other.done, other.seconds) == (5, 5)
    other.begin_epoch()
    assert other.seconds == 0


def test_meters_average_each_name_over_its_own_count():
    meters = Meters()
    meters.update({"a": torch.tensor(1.0), "b": torch.tensor(4.0)})
    meters.update({"a": torch.tensor(3.0)})
    assert meters.means() == {"a": 2.0, "b": 4.0}


def test_random_sizes_are_multiples_of_the_stride_and_repeat_for_the_same_step():
    resize = MultiScale(image_size=64, stride=32, seed=0)
    batch = Batch(torch.rand(1, 3, 64, 64), torch.zeros(0, 6), torch.ones(1, dtype=torch.bool))
    sizes = [tuple(resize(batch, Progress(step, 0, 50, 1)).images.shape[2:]) for step in range(50)]
    assert sizes == [tuple(resize(batch, Progress(step, 0, 50, 1)).images.shape[2:]) for step in range(50)]
    assert {side for size in sizes for side in size} == {32, 64, 96}
