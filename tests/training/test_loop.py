"""The step and the loop on a toy network: what is summed, measured, clipped and stopped."""

import copy

import pytest
import torch
from torch import nn

from utils.batch import Batch, Progress
from utils.errors import UserError
from utils.training.ema import ModelEma
from utils.training.loop import Meters, MultiScale, Trainer
from utils.training.optimizer import RateSchedule, build_optimizer
from utils.training.step import TrainingStep


class Toy(nn.Module):
    """A network with the two halves of a detector."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward_features(self, images):
        return (self.body(images),)

    def forward_head(self, features):
        return tuple(self.head(feature) for feature in features)


class Square(nn.Module):
    """The weighted mean square of the output."""

    def __init__(self, name, weight):
        super().__init__()
        self.names, self.label, self.weight = (name,), name, weight

    def forward(self, batch, output, progress):
        return {self.names[0]: self.weight * output.levels[0].square().mean()}


def schedule(batch_size=64):
    return RateSchedule(0.1, 1.0, False, 0.9, 0, 0.9, 0.1, batch_size)


def trainer_of(losses, batch_size=64, seed=0):
    torch.manual_seed(seed)
    step = TrainingStep(Toy(), losses)
    optimizer = build_optimizer([step], "SGD", rate=0.1, momentum=0.9, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Trainer(step, optimizer, schedule(batch_size), ModelEma(step.model), torch.device("cpu"), scaler)


def batch_of(images=2, seed=0):
    pixels = torch.rand(images, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Batch(pixels, torch.zeros(0, 6), torch.ones(images, dtype=torch.bool))


class Loader:
    """Batches in a list, with the epoch noted."""

    def __init__(self, batches):
        self.batches, self.epoch = batches, None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class Bar:
    """As much of a progress bar as the loop uses."""

    def __init__(self, loader):
        self.loader = loader

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
    _, gauges = trainer.step(batch_of(), Progress(0, 0, 8, 1))
    assert trainer.step.gauges == ("b_grad_ratio",)
    assert float(gauges["b_grad_ratio"]) == pytest.approx(3.0, rel=1e-5)


def test_gauges_are_sampled_four_times_an_epoch_and_never_for_a_single_loss():
    trainer = trainer_of([Square("a", 1.0), Square("b", 3.0)])
    sampled = [bool(trainer.step(batch_of(), Progress(step, 0, 12, 1))[1]) for step in range(12)]
    assert sampled == [step % 3 == 0 for step in range(12)]
    assert trainer_of([Square("a", 1.0)]).step(batch_of(), Progress(0, 0, 12, 1))[1] == {}


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
    means = trainer.run_epoch(loader, 4, 10, Bar, lambda batch, progress: seen.append(progress.step))
    assert loader.epoch == 4 and seen == [12, 13, 14]
    assert set(means) == {"a"} and means["a"] > 0


def test_a_loss_that_is_no_number_stops_the_run_with_its_place():
    trainer = trainer_of([Square("a", float("nan"))])
    with pytest.raises(UserError, match=r"epoch 1.*step 0.*not a finite number"):
        trainer.run_epoch(Loader([batch_of()]), 0, 1, Bar)


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
