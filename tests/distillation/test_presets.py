"""The presets against the seed's values and against the properties every distillation loss needs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from utils.batch import Batch, StudentOutput
from utils.distillation import pseudo_boxes as pseudo_boxes_module
from utils.distillation.matching import anchors_rescaled
from utils.distillation.presets import DenseOutputs, ObjectnessGated
from utils.distillation.pseudo_boxes import PseudoBoxes, logits_of
from utils.distillation.response import Response, ResponseGains, focused_cross_entropy
from utils.distillation.teacher import TeacherOutput
from utils.losses.detection import DetectionLoss, LossGains

CASES = json.loads(Path(__file__).with_name("dense_reference.json").read_text())
STRIDES = (8, 16, 32)
GAINS = LossGains()
ANCHORS_GRID = torch.tensor(
    [
        [[10, 13], [16, 30], [33, 23]],
        [[30, 61], [62, 45], [59, 119]],
        [[116, 90], [156, 198], [373, 326]],
    ]
) / torch.tensor(STRIDES).view(3, 1, 1)
DENSE = {
    "l2": DenseOutputs(GAINS, "l2", 20.0),
    "kl": DenseOutputs(GAINS, "kl", 20.0),
    "objectness": ObjectnessGated(GAINS),
    "response": Response(GAINS, ANCHORS_GRID),
}


def pseudo_boxes(soft=False, confidence=0.25):
    detection = DetectionLoss(ANCHORS_GRID, 3, GAINS)
    return PseudoBoxes(
        detection, torch.tensor(STRIDES), confidence=confidence, overlap=0.45, soft=soft, temperature=2.0
    )


ALL = {**DENSE, "boxes": pseudo_boxes(), "boxes soft": pseudo_boxes(soft=True)}


def levels_of(seed, scale=1.5, size=128, nc=3, batch=2, r=None):
    r = r or np.random.RandomState(seed)
    return tuple(
        torch.tensor(scale * r.standard_normal((batch, 3, size // s, size // s, 5 + nc)), dtype=torch.float32)
        for s in STRIDES
    )


def batch_of(count=2, size=128):
    return Batch(torch.zeros(count, 3, size, size), torch.zeros(0, 6), torch.ones(count, dtype=torch.bool))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["loss"])
def test_dense_presets_equal_the_seeds_values(case):
    r = np.random.RandomState(case["seed"])
    student = [level.requires_grad_() for level in levels_of(None, r=r)]
    teacher = levels_of(None, r=r)
    preset = DenseOutputs(LossGains(**case["gains"]), case["loss"], case["temperature"])
    total = (
        sum(preset(batch_of(), StudentOutput((), student), TeacherOutput(teacher)).values()) * case["batch"]
    )
    total.backward()
    assert float(total.detach()) == pytest.approx(case["total"], rel=1e-5)
    for level, wanted in zip(student, case["grad_abs_sum"], strict=True):
        assert float(level.grad.abs().sum()) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", DENSE)
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(name):
    teacher = levels_of(1)
    student = [level.clone().requires_grad_() for level in teacher]
    terms = DENSE[name](batch_of(), StudentOutput((), student), TeacherOutput(teacher))
    sum(terms.values()).backward()
    # log-softmax minus itself may leave a rounding error of one unit in the last place.
    assert sum(float(value.detach()) for value in terms.values()) == pytest.approx(0, abs=5e-6)
    assert all(float(level.grad.abs().max()) < 1e-6 for level in student)


def test_the_gated_loss_is_what_its_equations_say():
    student, teacher = levels_of(1), levels_of(2)
    terms = ObjectnessGated(GAINS)(batch_of(), StudentOutput((), student), TeacherOutput(teacher))
    by_hand = dict.fromkeys(("box", "obj", "cls"), 0.0)
    for own, target in zip(student, teacher, strict=True):
        seen = target[..., 4].sigmoid()
        squares = (own - target) ** 2
        by_hand["box"] += GAINS.box * float((seen[..., None] * squares[..., :4]).mean())
        by_hand["obj"] += GAINS.obj * float(((own[..., 4].sigmoid() - seen) ** 2).mean())
        by_hand["cls"] += GAINS.cls * float((seen[..., None] * squares[..., 5:]).mean())
    for name, value in by_hand.items():
        assert float(terms[name]) == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_a_better_student_has_a_smaller_loss(name):
    teacher = levels_of(1, scale=4)
    far = levels_of(2, scale=4)
    near = tuple(t + 0.1 * (f - t) for t, f in zip(teacher, far, strict=True))
    losses = [
        float(sum(ALL[name](batch_of(), StudentOutput((), levels), TeacherOutput(teacher)).values()))
        for levels in (near, far)
    ]
    assert losses[0] < losses[1]


@pytest.mark.parametrize("name", ALL)
def test_a_batch_without_a_confident_teacher_cell_is_finite(name):
    teacher = levels_of(1)
    for level in teacher:
        level[..., 4] = -30
    student = [level.requires_grad_() for level in levels_of(2)]
    terms = ALL[name](batch_of(), StudentOutput((), student), TeacherOutput(teacher))
    sum(terms.values()).backward()
    assert all(torch.isfinite(value) for value in terms.values())
    assert all(torch.isfinite(level.grad).all() for level in student)


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_reduced_precision_logits_of_40_stay_finite(name, dtype, cast):
    """With autocast, in which a training step runs losses and all, and without: the terms are float32's."""
    found = []
    for kind in (torch.float32, dtype):
        student = [(level.sign() * 40).to(kind).requires_grad_() for level in levels_of(2, size=64)]
        teacher = tuple((level.sign() * 40).to(kind) for level in levels_of(1, size=64))
        with torch.autocast("cpu", dtype, enabled=cast and kind is dtype):
            terms = ALL[name](batch_of(size=64), StudentOutput((), student), TeacherOutput(teacher))
        sum(terms.values()).backward()
        assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in terms.values())
        assert all(torch.isfinite(level.grad).all() for level in student)
        found.append((terms, [level.grad.to(dtype) for level in student]))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("name", ["l2", "kl", "objectness", "response"])
def test_dense_class_and_box_terms_ignore_cells_where_the_teacher_sees_nothing(name):
    teacher = levels_of(1, size=64)
    for level in teacher:
        level[..., 4] = -40.0
    student = levels_of(2, size=64)
    terms = DENSE[name](batch_of(size=64), StudentOutput((), student), TeacherOutput(teacher))
    assert float(terms["box"]) < 1e-12 and float(terms["cls"]) < 1e-12
    if name in ("objectness", "response"):
        assert float(terms["obj"]) > 0.1  # a false positive of the student is punished all the same


def test_pseudo_targets_are_the_teachers_detections_with_their_logits():
    teacher = tuple(torch.full((1, 3, 64 // s, 64 // s, 8), -10.0) for s in STRIDES)
    # One object: cell (3, 2) of the middle level, anchor 1 (62 x 45 px), in the middle of the cell.
    teacher[1][0, 1, 2, 3] = torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0, -3.0, 6.0, -2.0])
    preset, batch = pseudo_boxes(), batch_of(1, 64)
    targets, rows = preset.pseudo_targets(batch, TeacherOutput(teacher))
    wanted = torch.tensor([[0, 1, 3.5 * 16 / 64, 2.5 * 16 / 64, 62 / 64, 45 / 64]])
    torch.testing.assert_close(targets, wanted, atol=1e-4, rtol=1e-4)
    assigned = preset.detection.assign(targets, teacher, batch.labelled, padded=True)
    logits, real = logits_of(teacher, assigned, rows), assigned.mask > 0
    assert real.any() and not logits[~real].any()
    torch.testing.assert_close(logits[real], torch.tensor([[-3.0, 6.0, -2.0]]).expand(int(real.sum()), 3))


def test_more_detections_than_candidates_are_found_all_the_same(monkeypatch):
    teacher, batch = TeacherOutput(levels_of(1, scale=4, size=64)), batch_of(size=64)
    expected = pseudo_boxes().pseudo_targets(batch, teacher)
    monkeypatch.setattr(pseudo_boxes_module, "MOST_OF_BEST", 5)
    for found, wanted in zip(pseudo_boxes().pseudo_targets(batch, teacher), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert len(expected[1]) > 10


def test_pseudo_boxes_equal_the_ground_truth_loss_for_the_same_boxes():
    """Box and objectness terms are those of the ground-truth loss when teacher and labels agree."""
    preset = pseudo_boxes()
    teacher = TeacherOutput(levels_of(1, scale=4, size=64))
    targets, _ = preset.pseudo_targets(batch_of(size=64), teacher)
    assert len(targets) > 10
    student = StudentOutput((), levels_of(2, size=64))
    wanted = preset.detection(
        Batch(torch.zeros(2, 3, 64, 64), targets, torch.ones(2, dtype=torch.bool)), student
    )
    terms = preset(batch_of(size=64), student, teacher)
    assert float(terms["box"]) == pytest.approx(float(wanted["box"]))
    assert float(terms["obj"]) == pytest.approx(float(wanted["obj"]))


def test_the_response_of_one_object_is_what_the_equations_say():
    """One cell of the middle level, worked out by hand; every other cell agrees."""
    teacher = tuple(torch.full((1, 3, 64 // s, 64 // s, 8), -30.0) for s in STRIDES)
    student = tuple(level.clone() for level in teacher)
    teacher[1][0, 1, 2, 3] = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0, 1.0, -1.0, -2.0])
    student[1][0, 1, 2, 3] = torch.tensor([0.0, 0.0, 0.0, 0.0, -1.0, 0.0, -1.0, -2.0])
    terms = Response(LossGains(box=1, obj=1, cls=1), ANCHORS_GRID, ResponseGains(1, 1, 1))(
        batch_of(1, 64), StudentOutput((), student), TeacherOutput(teacher)
    )
    wanted, given = 1 / (1 + math.exp(-1)), 0.5
    entropy = -(wanted * math.log(given) + (1 - wanted) * math.log(1 - given))
    weight = 1 / (1 + math.exp(-2))  # below 1, so that the sum of weights counts as 1
    assert float(terms["cls"]) == pytest.approx(weight * (wanted - given) * entropy / 3, rel=1e-4)
    assert float(terms["box"]) == pytest.approx(0, abs=1e-5)
    seen, found = weight, 1 / (1 + math.exp(1))
    entropy = -(seen * math.log(found) + (1 - seen) * math.log(1 - found))
    assert float(terms["obj"]) == pytest.approx((seen - found) * entropy / (3 * 4 * 4), rel=1e-4)


def overlaps(one, other):
    """CIoU (arXiv 1911.08287, eq. 10) and IoU of two boxes that meet, each (centre x, y, width, height)."""
    (l1, t1, r1, b1), (l2, t2, r2, b2) = (
        (x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (one, other)
    )
    shared = (min(r1, r2) - max(l1, l2)) * (min(b1, b2) - max(t1, t2))
    iou = shared / (one[2] * one[3] + other[2] * other[3] - shared)
    distance = (one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2
    diagonal = (max(r1, r2) - min(l1, l2)) ** 2 + (max(b1, b2) - min(t1, t2)) ** 2
    shape = 4 / math.pi**2 * (math.atan(one[2] / one[3]) - math.atan(other[2] / other[3])) ** 2
    return iou - distance / diagonal - shape**2 / (1 - iou + shape), iou


def test_boxes_and_objectness_of_the_finest_and_coarsest_level_are_what_the_equations_say():
    """Boxes that are shifted and of other sides, on one cell of P3 and one of P5; elsewhere both agree."""
    teacher = tuple(torch.full((1, 3, 64 // s, 64 // s, 8), -30.0) for s in STRIDES)
    student = tuple(level.clone() for level in teacher)
    places = {0: (0, 2, 5, 1), 2: (0, 1, 0, 1)}  # image, anchor, row, column
    theirs = {0: [0.4, -0.3, 0.2, -0.5, 1.5], 2: [-0.6, 0.1, -0.4, 0.3, 0.5]}
    mine = {0: [-0.2, 0.3, -0.3, 0.4, -1.0], 2: [0.2, -0.1, 0.5, -0.2, 2.0]}
    for level, place in places.items():
        teacher[level][place][:5] = torch.tensor(theirs[level])
        student[level][place][:5] = torch.tensor(mine[level])

    def probability(logit):
        return 1 / (1 + math.exp(-logit))

    def box(raw, anchor):
        x, y, w, h = (2 * probability(value) for value in raw[:4])
        return x - 0.5, y - 0.5, w**2 * float(anchor[0]), h**2 * float(anchor[1])

    boxes = objectness = seen = 0.0
    for level, cells, balance in ((0, 3 * 8 * 8, 4.0), (2, 3 * 2 * 2, 0.4)):
        anchor = ANCHORS_GRID[level, places[level][1]]
        overlap, plain = overlaps(box(mine[level], anchor), box(theirs[level], anchor))
        assert 0.1 < overlap < plain - 0.02
        weight, found = probability(theirs[level][4]), probability(mine[level][4])
        boxes, seen = boxes + weight * (1 - overlap), seen + weight
        entropy = -(weight * math.log(found) + (1 - weight) * math.log(1 - found))
        objectness += balance / cells * abs(weight - found) * entropy
    assert seen > 1
    preset = Response(LossGains(box=1, obj=1, cls=1), ANCHORS_GRID, ResponseGains(1, 1, 1))
    for concatenated in (False, True):
        preset.concatenate_levels = concatenated
        terms = preset(batch_of(1, 64), StudentOutput((), student), TeacherOutput(teacher))
        assert float(terms["box"]) == pytest.approx(boxes / seen, rel=1e-4)
        assert float(terms["obj"]) == pytest.approx(objectness, rel=1e-4)


@pytest.mark.parametrize("temperature", [None, 2.0, 5.0])
def test_the_class_term_of_a_matched_cell_is_what_its_formula_says(temperature):
    """Squared error of logits, or with a temperature the soft form; one detection, matched by one cell."""
    own, wanted = [1.0, 2.0, -1.0], [-3.0, 6.0, -2.0]
    teacher = tuple(torch.full((1, 3, 64 // s, 64 // s, 8), -10.0) for s in STRIDES)
    teacher[1][0, 1, 2, 3] = torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0, *wanted])
    student = tuple(torch.full_like(level, -10.0) for level in teacher)
    student[1][0, 1, 2, 3, 5:] = torch.tensor(own)
    # In the middle of its cell it has no neighbour to share it with, and it fits its own anchor alone.
    detection = DetectionLoss(ANCHORS_GRID, 3, LossGains(cls=0.5, anchor_t=1.1))
    preset = PseudoBoxes(
        detection, torch.tensor(STRIDES), confidence=0.25, overlap=0.45, soft=temperature is not None,
        temperature=temperature or 1.0,
    )  # fmt: skip
    terms = preset(batch_of(1, 64), StudentOutput((), student), TeacherOutput(teacher))
    if temperature is None:
        distance = sum((a - b) ** 2 for a, b in zip(own, wanted, strict=True))
    else:
        powers = [[math.exp(logit / temperature) for logit in logits] for logits in (own, wanted)]
        q, p = ([power / sum(row) for power in row] for row in powers)
        distance = temperature**2 * sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    assert float(terms["cls"]) == pytest.approx(0.5 * distance / 3, rel=1e-4)


def test_the_response_does_not_shrink_with_the_picture():
    """An image with more background has the same loss of classes and boxes for the same objects."""

    def terms(size):
        teacher = tuple(torch.full((1, 3, size // s, size // s, 8), -30.0) for s in STRIDES)
        student = tuple(level.clone() for level in teacher)
        teacher[0][0, :, :2, :2] = 3.0
        student[0][0, :, :2, :2] = 1.0
        preset = Response(GAINS, ANCHORS_GRID)
        return preset(batch_of(1, size), StudentOutput((), student), TeacherOutput(teacher))

    small, large = terms(64), terms(256)
    for name in ("box", "cls"):
        assert float(small[name]) == pytest.approx(float(large[name]), rel=1e-5)


@pytest.mark.parametrize("complete", [True, False])
def test_all_levels_together_are_the_levels_one_by_one(complete):
    """What a GPU does, in memory of either order."""
    found = []
    for concatenated in (False, True):
        preset = Response(GAINS, ANCHORS_GRID, complete=complete)
        preset.concatenate_levels = concatenated
        teacher = levels_of(1, scale=2.0, size=64)
        student = [level.clone().requires_grad_() for level in levels_of(2, scale=2.0, size=64)]
        seen = [level.movedim(1, 3).contiguous().movedim(3, 1) for level in student]
        for _ in range(2):  # the second time with what was kept from the first
            terms = preset(batch_of(size=64), StudentOutput((), seen), TeacherOutput(teacher))
        sum(terms.values()).backward()
        found.append([*terms.values(), *(level.grad for level in student)])
    for apart, together in zip(*found, strict=True):
        assert float(apart.detach().abs().max()) > 0
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-7)


def test_the_same_boxes_relative_to_other_anchors_have_no_box_loss():
    """A teacher with anchors of its own, laid onto a student whose boxes are the same in pixels."""
    own, other = ANCHORS_GRID[0], ANCHORS_GRID[0] * torch.tensor([[1.3, 0.8], [0.9, 1.1], [1.0, 1.2]])
    teacher = levels_of(1, scale=0.7, size=64)[0]
    sizes = (2 * teacher[..., 2:4].sigmoid()) ** 2 * own[:, None, None]
    student = teacher.clone()
    student[..., 2:4] = ((sizes / other[:, None, None]).sqrt() / 2).logit()
    laid = anchors_rescaled(teacher, own, other)
    loss = Response(GAINS, other[None])
    terms = loss(batch_of(size=64), StudentOutput((), (student,)), TeacherOutput((laid,)))
    assert float(terms["box"]) == pytest.approx(0, abs=1e-6)
    unmoved = loss(batch_of(size=64), StudentOutput((), (student,)), TeacherOutput((teacher,)))
    assert float(unmoved["box"]) > 1e-3


@pytest.mark.parametrize("name", ["response", "objectness", "boxes"])
def test_where_the_teacher_lacks_a_class_its_background_says_nothing(name):
    """A cell in which the student sees an object that the teacher cannot know."""
    detection = DetectionLoss(ANCHORS_GRID, 3, GAINS, complete=False)
    presets = {
        "response": Response(GAINS, ANCHORS_GRID, complete=False),
        "objectness": ObjectnessGated(GAINS, complete=False),
        "boxes": PseudoBoxes(
            detection, torch.tensor(STRIDES), confidence=0.25, overlap=0.45, soft=False, temperature=2.0
        ),
    }
    teacher = levels_of(1, size=64)
    for level in teacher:
        level[..., 4] = -8.0
    teacher[0][0, 0, 4, 4, 4:6] = 8.0  # one object that it knows
    student = [level.clone().requires_grad_() for level in teacher]
    with torch.no_grad():
        student[0][1, 1, 2, 2, 4] = 4.0
    terms = presets[name](batch_of(size=64), StudentOutput((), student), TeacherOutput(teacher))
    sum(terms.values()).backward()
    at_background = student[0].grad[1, 1, 2, 2, 4].abs()
    whole = DENSE[name] if name in DENSE else pseudo_boxes()
    told = [level.detach().clone().requires_grad_() for level in student]
    sum(whole(batch_of(size=64), StudentOutput((), told), TeacherOutput(teacher)).values()).backward()
    assert float(at_background) < 0.01 * float(told[0].grad[1, 1, 2, 2, 4].abs())


@pytest.mark.parametrize("shape", [(50, 7), (2, 3, 5, 4, 7), (1, 3, 90, 90, 7)])
def test_the_focused_cross_entropy_has_the_value_and_gradient_of_its_formula(shape):
    torch.manual_seed(0)
    target, weights = 4 * torch.randn(shape), torch.rand(shape[:-1])
    own = (4 * torch.randn(shape)).requires_grad_()
    by_parts = own.detach().clone().requires_grad_()
    value = focused_cross_entropy(own, target, weights)
    distance = (target.sigmoid() - by_parts.sigmoid()).abs() * F.binary_cross_entropy_with_logits(
        by_parts, target.sigmoid(), reduction="none"
    )
    wanted = (distance * weights[..., None]).sum()
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=0)
    (3 * value).backward()
    (3 * wanted).backward()
    torch.testing.assert_close(own.grad, by_parts.grad, rtol=1e-5, atol=1e-6)


def test_the_focused_cross_entropy_is_finite_and_right_at_large_logits():
    own = torch.tensor([[-60.0, 60.0, 60.0, -60.0, 0.0]], requires_grad=True)
    value = focused_cross_entropy(own, torch.tensor([[60.0, -60.0, 60.0, -60.0, 0.0]]), torch.ones(1))
    value.backward()
    assert float(value.detach()) == pytest.approx(120.0)
    assert own.grad.tolist() == [[-1.0, 1.0, 0.0, 0.0, 0.0]]
