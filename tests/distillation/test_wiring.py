"""What each option of distillation sets, and what a teacher of a part of the levels and classes changes."""

from types import SimpleNamespace

import pytest
import torch

from models.decode import decode
from models.yolo import Model
from utils.batch import Batch, Progress, StudentOutput
from utils.config.options import DistillOptions
from utils.distillation.distiller import Distiller
from utils.distillation.ensemble import Teachers
from utils.distillation.recipe import build_distiller, build_preset, response_gains
from utils.distillation.schedule import DistillSchedule
from utils.distillation.teacher import Teacher
from utils.losses.detection import DetectionLoss, LossGains

NAMES = ["cell", "dot", "ring", "star"]
GAINS = LossGains(box=0.05, obj=1.0, cls=0.4)


def network(names):
    model = Model("models/demo-student.yaml", nc=len(names))
    model.names = list(names)
    return model


def context_of(student):
    """What a recipe is given, of a run that goes on: nobody is scored."""
    return SimpleNamespace(
        model=student, ema=network(NAMES).eval(), is_new=False, names=tuple(NAMES), merged=(),
        image_size=64, device=torch.device("cpu"), detection=DetectionLoss(student.head.anchors, 4, GAINS),
        say=lambda _: None, warn=lambda _: None,
    )  # fmt: skip


def options_of(**given):
    return DistillOptions(teacher=("ema",), **given)


def distiller_of(**given):
    return build_distiller(options_of(**given), [None], context_of(network(NAMES)))


def preset_of(known=NAMES, scale=1.0, **given):
    """The preset for a teacher of such classes, whose images are `scale` times the student's."""
    student = network(NAMES)
    teachers = Teachers([Teacher(network(known), scale=scale)], student, NAMES)
    return build_preset(options_of(**given), context_of(student), teachers)


def test_the_schedule_is_that_of_the_options():
    asked = dict(distill_schedule="cosine", distill_final=0.3, distill_warmup=1.5, stop_distill=2, epochs=9)
    assert distiller_of(**asked).schedule == DistillSchedule("cosine", 0.3, 1.5, 2)


def test_the_weights_are_those_of_the_options():
    fixed = distiller_of(distill_ratio=0.25, feature_loss="pkd", feature_ratio=3.0)
    assert (fixed.ratio, fixed.balance, fixed.feature_ratio) == (0.25, None, 3.0)
    assert [loss.kind for loss in fixed.features] == ["pkd"]
    follows = distiller_of(distill_ratio="auto", auto_ratio=0.75)
    assert follows.balance.target == 0.75 and follows.ratio == 1 and not len(follows.features)


def test_each_term_of_the_response_has_the_weight_of_its_own_option():
    preset = preset_of(distill_box=2.0, distill_obj=3.0, distill_cls=5.0)
    assert (preset.box, preset.obj, preset.cls) == pytest.approx((2 * 0.05, 3 * 1.0, 5 * 0.4))


def test_weights_that_are_not_named_suit_the_number_of_classes():
    gains = [
        response_gains(options_of(**given), count)
        for given, count in (
            ({}, 1),
            ({}, 10),
            ({}, 11),
            (dict(distill_cls=0.0), 3),
            (dict(distill_box=0.0), 80),
        )
    ]
    assert [(one.box, one.obj, one.cls) for one in gains] == [
        (6, 3, 3), (6, 3, 3), (1, 1, 8), (6, 3, 0), (0, 1, 8),
    ]  # fmt: skip
    preset = preset_of()
    assert (preset.box, preset.obj, preset.cls) == pytest.approx((6 * 0.05, 3 * 1.0, 3 * 0.4))


def test_boxes_and_kl_are_made_as_the_options_say():
    boxes = preset_of(soft_loss=True, temperature=3.0, t_conf_thres=0.1, t_nms_thres=0.6)
    assert boxes.soft and boxes.temperature == 3.0
    assert (boxes.rules.conf_thres, boxes.rules.iou_thres) == (0.1, 0.6)
    assert not preset_of(distill_loss="boxes").soft
    dense = preset_of(distill_loss="kl", temperature=3.0)
    assert (dense.class_loss, dense.temperature) == ("kl", 3.0)
    assert preset_of(distill_loss="l2").class_loss == "l2"


@pytest.mark.parametrize("kind", ["response", "boxes", "objectness"])
def test_only_a_teacher_of_all_classes_is_believed_what_it_calls_background(kind):
    for known, complete in ((NAMES, True), ([*NAMES, "cat"], True), (["dot", "cat", "cell"], False)):
        preset = preset_of(known, distill_loss=kind)
        assert getattr(preset, "detection", preset).complete is complete


@pytest.mark.parametrize(("scale", "rows"), [(1.0, [0, 1, 2]), (2.0, [0, 1]), (0.5, [1, 2])])
@pytest.mark.parametrize("kind", ["response", "boxes"])
def test_levels_that_a_teacher_shares_keep_their_anchors_and_balance(kind, scale, rows):
    """Of smaller images it has no cells as fine as the student's, of larger ones none as coarse."""
    preset, head = preset_of(scale=scale, distill_loss=kind), network(NAMES).head
    balanced = getattr(preset, "detection", preset)
    assert list(balanced.balance) == [(4.0, 1.0, 0.4)[row] for row in rows]
    torch.testing.assert_close(balanced.anchors_grid, head.anchors[rows])
    if kind == "boxes":  # logits of 0: in the middle of their cells, as large as their anchors
        strides = [(8, 16, 32)[row] for row in rows]
        levels = [torch.zeros(1, 3, 64 // stride, 64 // stride, 9) for stride in strides]
        decoded = decode(levels, preset.anchors_px, preset.strides)
        first = torch.tensor([strides[0] / 2, strides[0] / 2, *(head.anchors[rows[0], 0] * strides[0])])
        torch.testing.assert_close(decoded[0, 0, :4], first)
        assert decoded.shape[1] == sum(3 * (64 // stride) ** 2 for stride in strides)


class Constant(torch.nn.Module):
    """A feature loss of a given value."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, *_maps):
        return torch.tensor(self.value)


def test_the_feature_term_is_the_mean_over_teachers_times_both_ratios():
    members = [SimpleNamespace(fit=SimpleNamespace(levels=())) for _ in range(2)]
    view = SimpleNamespace(features=(), unconverted_levels=())

    class Both:
        def __init__(self):
            self.members = members

        def __call__(self, _images):
            return view, [view, view]

    distiller = Distiller(
        Both(), None, 2.0, features=[Constant(4.0), Constant(8.0)], feature_ratio=0.25
    ).train()
    batch = Batch(torch.zeros(1, 3, 32, 32), torch.zeros(0, 6), torch.ones(1, dtype=torch.bool))
    terms = distiller(batch, StudentOutput((), ()), Progress(0, 0, 4, 4))
    assert {name: float(value) for name, value in terms.items()} == {"distill_feature": 6 * 0.25 * 2}
