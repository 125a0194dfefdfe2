"""A teacher is frozen, fits the student or is refused, and lies outside of everything trained."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from models.checkpoint import save_checkpoint
from models.names import ClassMap
from tests.distillation.networks import NAMES, network
from utils.batch import Batch, Progress, StudentOutput
from utils.distillation.distiller import Distiller
from utils.distillation.ensemble import Teachers
from utils.distillation.matching import anchors_rescaled, objectness_of
from utils.distillation.presets import DenseOutputs
from utils.distillation.recipe import compare_scores
from utils.distillation.teacher import Teacher, TeacherInStudentFrame, checksum
from utils.errors import UserError
from utils.evaluation.disagreement import objectness_map
from utils.losses.detection import LossGains


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


# Fused and unfused outputs (with a deviation of 3) may differ by this much, and do so by up to .005.
FUSED = 0.02


@torch.no_grad()
def outputs_of(model, images):
    """The raw levels of a network that has not been made a teacher."""
    return model.forward_head(model.forward_features(images))


def test_what_a_teacher_says_depends_on_what_it_sees(images):
    """Otherwise none of the comparisons below would notice other images."""
    for one, other in zip(outputs_of(network(), images), outputs_of(network(), images.flip(3)), strict=True):
        assert float((one - other).abs().amax()) > 1


def test_outputs_carry_no_gradient_and_equal_the_unfused_network(images):
    expected = outputs_of(network(), images)
    teacher = Teacher(network())
    teacher.fit_to(network(1), NAMES)
    levels = teacher(images).levels
    assert not any(level.requires_grad for level in levels)
    for got, want in zip(levels, expected, strict=True):
        torch.testing.assert_close(got, want, atol=FUSED, rtol=1e-3)


def test_train_mode_of_the_step_does_not_reach_the_teacher(images):
    teacher, student = Teacher(network()), network(1)
    distiller = Distiller(
        Teachers([teacher], student, NAMES), DenseOutputs(LossGains(), "l2", 1.0), ratio=0.5
    )
    distiller.train()
    before = checksum(teacher.model)
    features = student.forward_features(images)
    output = StudentOutput(features, student.forward_head(features))
    batch = Batch(images, torch.zeros(0, 6), torch.ones(2, dtype=torch.bool))
    distiller(batch, output, Progress(0, 0, 1, 1))
    assert not teacher.model.training
    assert checksum(teacher.model) == before
    distiller.finish()
    assert list(distiller.state_dict()) == ["_extra_state"] and list(distiller.parameters()) == []


def test_a_changed_teacher_is_noticed_at_the_end():
    teacher = Teacher(network())
    teachers = Teachers([teacher], network(1), NAMES)
    distiller = Distiller(teachers, DenseOutputs(LossGains(), "l2", 1.0), ratio=1.0)
    with torch.no_grad():
        next(teacher.model.parameters()).add_(1)
    with pytest.raises(AssertionError, match="changed"):
        distiller.finish()


def test_a_teacher_in_reduced_precision_says_what_it_says_under_autocast(images):
    teacher, own = Teacher(network()), Teacher(network(), frozen=False)
    for member in (teacher, own):
        member.model.eval()
        member.fit_to(network(1), NAMES)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = teacher(images)
    for member in (teacher, own):
        member.compute_in(torch.bfloat16)
    kinds = {m.weight.dtype for m in teacher.model.modules() if isinstance(m, torch.nn.Conv2d)}
    assert kinds == {torch.bfloat16} and next(own.model.parameters()).dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        found = teacher(images)
    alone = teacher(images)  # beside a student in float32
    judged = TeacherInStudentFrame(teacher, len(NAMES))
    levels = judged.forward_head(judged.forward_features(images))
    for got, other, raw, own_way in zip(found.levels, levels, wanted.levels, alone.levels, strict=True):
        assert torch.equal(got, raw) and torch.equal(other, raw) and torch.equal(own_way, raw)
    assert judged.decode_levels(levels).dtype is torch.float32
    teacher.assert_unchanged()
    with torch.no_grad():
        next(teacher.model.parameters()).add_(1)
    with pytest.raises(AssertionError, match="changed"):
        teacher.assert_unchanged()


def test_the_ratio_scales_every_term(images):
    student = network(1)
    teachers = Teachers([Teacher(network())], student, NAMES)
    features = student.forward_features(images)
    output = StudentOutput(features, student.forward_head(features))
    batch = Batch(images, torch.zeros(0, 6), torch.ones(2, dtype=torch.bool))
    one, three = (
        Distiller(teachers, DenseOutputs(LossGains(), "l2", 1.0), ratio)(batch, output, Progress(0, 0, 1, 1))
        for ratio in (1.0, 3.0)
    )
    assert set(one) == {"distill_box", "distill_obj", "distill_cls"}
    for name in one:
        assert float(three[name].detach()) == pytest.approx(3 * float(one[name].detach()), rel=1e-5)


def test_classes_in_another_order_are_put_into_the_students(images):
    teacher = Teacher(network())
    teacher.fit_to(network(1), NAMES)
    plain = teacher(images).levels
    teacher.fit_to(network(1), ["ring", "cell", "dot"])
    assert teacher.model.names == ["ring", "cell", "dot"]
    for got, raw in zip(teacher(images).levels, plain, strict=True):
        torch.testing.assert_close(got[..., 5:], raw[..., [7, 5, 6]], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[..., :5], raw[..., :5], atol=1e-5, rtol=1e-5)
    teacher.assert_unchanged()


def test_classes_are_matched_by_name_and_what_one_side_lacks_is_left_out(images):
    teacher, student = Teacher(network(names=["dot", "cat", "cell"])), network(1)
    teacher.fit_to(student, NAMES)
    classes = teacher.fit.classes
    assert (classes.student, classes.teacher) == ((0, 1), (2, 0))
    assert "ring" in str(classes) and "cat" in str(classes)
    taught = teacher(images)
    features = student.forward_features(images)
    output = StudentOutput(features, student.forward_head(features))
    own = teacher.fit.of_student(output)
    for mine, theirs, raw, level in zip(
        own.levels, taught.levels, taught.unconverted_levels, output.levels, strict=True
    ):
        assert mine.shape == theirs.shape and mine.shape[-1] == 7
        torch.testing.assert_close(theirs[..., 5:], raw[..., [7, 5]])
        torch.testing.assert_close(mine, level[..., :7])


def test_an_object_of_an_ignored_class_is_none():
    level = torch.full((1, 1, 1, 2, 8), -4.0)
    level[..., 4] = 5.0
    level[0, 0, 0, 0, 6] = 6.0  # surely the second class
    level[0, 0, 0, 1, 5] = 6.0  # surely the first
    seen = objectness_of(level, torch.tensor([0, 2])).sigmoid().flatten()
    assert seen[0] < 0.03 and seen[1] > 0.98


def test_levels_of_another_head_are_matched_by_their_cells(images):
    six, five = network(cfg="models/hub/yolov5n6.yaml"), network(1)
    six_as_teacher, five_as_teacher = Teacher(six), Teacher(network(2))
    six_as_teacher.fit_to(five, NAMES)
    assert [(pair.student, pair.teacher) for pair in six_as_teacher.fit.levels] == [(0, 0), (1, 1), (2, 2)]
    five_as_teacher.fit_to(network(cfg="models/hub/yolov5n6.yaml"), NAMES)
    assert len(five_as_teacher.fit.levels) == 3
    for taught in (six_as_teacher(images), five_as_teacher(images)):
        assert [level.shape[2] for level in taught.levels] == [8, 4, 2]


def test_a_teacher_may_see_larger_pictures(images):
    teacher, student = Teacher(network(), scale=2.0), network(1)
    teacher.fit_to(student, NAMES)
    assert [(pair.student, pair.teacher) for pair in teacher.fit.levels] == [(0, 1), (1, 2)]
    assert teacher.mapping == (
        "its cells fit 2 of the student's 3 levels; those of stride 32 learn from the labels alone"
    )
    taught = teacher(images)
    assert [level.shape[2] for level in taught.levels] == [8, 4]
    larger = F.interpolate(images, scale_factor=2, mode="bilinear", antialias=True)
    for got, want in zip(taught.unconverted_levels, outputs_of(network(), larger)[1:], strict=True):
        torch.testing.assert_close(got, want, atol=FUSED, rtol=1e-3)
    # The same boxes in pixels: anchors of 30 to 119 px at twice the size are 15 to 60 px here.
    pair = teacher.fit.levels[0]
    raw = taught.unconverted_levels[0][:, pair.anchor_of, ..., 2:4]
    anchors_px = teacher.model.anchors_px[1][pair.anchor_of] / 2
    before = (2 * raw.sigmoid()) ** 2 * anchors_px[None, :, None, None]
    moved = (2 * taught.levels[0][..., 2:4].sigmoid()) ** 2 * student.anchors_px[0][None, :, None, None]
    largest = 4 * student.anchors_px[0][None, :, None, None]  # that such anchors can represent
    torch.testing.assert_close(moved, before.minimum(largest), atol=1e-2, rtol=1e-2)


def test_a_teacher_without_common_cells_is_refused_with_both_sides_named():
    teacher = Teacher(network(), "teacher.pt", scale=1.5)
    with pytest.raises(UserError) as error:
        teacher.fit_to(network(1), NAMES)
    for word in ("teacher.pt", "[8, 16, 32]", "1.5 times", "--teacher-img-size"):
        assert word in str(error.value)


def test_boxes_are_the_same_relative_to_other_anchors():
    level = torch.randn(1, 3, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    own, other = torch.tensor([[2.0, 3], [4, 6], [8, 7]]), torch.tensor([[3.0, 3], [4, 5], [9, 10]])
    moved = anchors_rescaled(level, own, other)
    for anchor in range(3):
        before = (2 * level[:, anchor, ..., 2:4].sigmoid()) ** 2 * own[anchor]
        after = (2 * moved[:, anchor, ..., 2:4].sigmoid()) ** 2 * other[anchor]
        torch.testing.assert_close(
            after, before.clamp(max=4 * other[anchor].min() * 10), atol=1e-3, rtol=1e-3
        )
    torch.testing.assert_close(moved[..., 4:], level[..., 4:])


def test_classes_that_the_file_does_not_name_are_taken_to_be_the_data_s(tmp_path, images):
    weights = tmp_path / "bare.pt"
    torch.save(network().state_dict(), weights)
    teacher = Teacher.from_file(weights, torch.device("cpu"), "models/yolov5n.yaml")
    assert teacher.names is None
    teacher.fit_to(network(1), NAMES)
    assert teacher(images).levels[0].shape[-1] == 5 + len(NAMES)


def test_a_file_that_describes_its_network_needs_no_cfg_and_bears_a_wrong_one(tmp_path):
    """The public v5.0 and v6 networks share their names; several teachers share one --teacher-cfg."""
    cpu, older = torch.device("cpu"), network(cfg="models/v5.0/yolov5s.yaml")
    save_checkpoint(tmp_path / "own.pt", model=older, epoch=0, best_fitness=0.0, meta={})
    teacher = Teacher.from_file(tmp_path / "own.pt", cpu, "model/yolov5s.yaml")
    assert "is not used: its file describes" in teacher.remark and len(teacher.model.model) == len(
        older.model
    )
    torch.save(older.state_dict(), tmp_path / "bare.pt")
    bare = Teacher.from_file(tmp_path / "bare.pt", cpu, "models/v5.0/yolov5s.yaml")
    assert not bare.remark and bare.identity == checksum(older)


def test_a_single_class_may_be_called_anything_and_spelling_does_not_count():
    Teacher(network(names=["person"])).fit_to(network(names=["item"]), ["item"])
    teacher = Teacher(network(names=["Traffic-Light", "dining_table"]))
    teacher.fit_to(network(names=["dining table", "traffic light"]), ["dining table", "traffic light"])
    assert teacher.names == ["dining_table", "Traffic-Light"]
    assert Teacher(network(names=["cat", "dog"])).names == ["cat", "dog"]


def test_classes_that_are_one_for_the_student_are_taught_as_one(images):
    """With --single-cls: an object of any of the data's classes, surely of the one class."""
    names, teacher, student = (
        ["a", "b", "c"],
        Teacher(network(names=["x", "c", "a"])),
        network(names=["item"]),
    )
    teacher.fit_to(student, ["item"], merged=names)
    assert teacher.known.student == (0,) and teacher.known.teacher == (2, 1)
    assert teacher.mapping == (
        "2 of 3 classes known to the teacher; unknown 1 class (b); the teacher's other 1 class (x) ignored; "
        "matched: 2 classes (a, c) as one, 'item'"
    )
    said = teacher(images)
    for merged, raw in zip(said.levels, said.unconverted_levels, strict=True):
        assert merged.shape == (*raw.shape[:-1], 6)
        torch.testing.assert_close(merged[..., :4], raw[..., :4])
        scores = raw[..., 5:].sigmoid()
        share = scores[..., 1:].amax(-1) / scores.amax(-1)
        torch.testing.assert_close(merged[..., 4].sigmoid(), raw[..., 4].sigmoid() * share)
        # What the network of one class says itself, before it has learnt anything.
        assert (merged[..., 5].sigmoid() > 0.9999).all()
    judged = TeacherInStudentFrame(teacher, 1)
    levels = judged.forward_head(judged.forward_features(images))
    decoded, own = judged.decode_levels(levels), teacher.model.decode_levels(levels)
    torch.testing.assert_close(decoded[..., :5], own[..., :5])
    torch.testing.assert_close(decoded[..., 5], own[..., [6, 7]].amax(-1))


def test_classes_that_are_one_keep_the_teacher_s_objectness_where_all_are_known(images):
    teacher, student = Teacher(network(names=["b", "a"])), network(names=["item"])
    teacher.fit_to(student, ["item"], merged=["a", "b"])
    said = teacher(images)
    for merged, raw in zip(said.levels, said.unconverted_levels, strict=True):
        assert torch.equal(merged[..., :5], raw[..., :5])
    stranger = Teacher(network(names=["x", "y"]))
    stranger.fit_to(student, ["item"], merged=["a", "b"])
    assert not stranger.fit.classes.student
    both = Teachers([teacher, stranger], student, ["item"], ["a", "b"])
    assert both.fit.classes.student == (0,) and not stranger.fit.classes.student
    orders = []
    for first, second in (("ab", "bx"), ("bx", "ab")):
        pair = [Teacher(network(names=list(own)), own) for own in (first, second)]
        together = Teachers(pair, student, ["item"], ["a", "b"])
        assert together.note == (
            "the teachers together: 2 of 2 classes known, each learnt from those that know it"
        )
        assert not together.fit.classes.unknown
        orders.append(together(images)[0].levels)
    for one, other in zip(*orders, strict=True):
        assert one.shape == other.shape
    single = Teacher(network(names=["thing"]))
    single.fit_to(student, ["item"], merged=["a", "b"])
    assert single.fit.classes.is_identity and single.mapping == "its class 'thing' is taken for 'item'"


def test_unnamed_classes_of_another_number_are_refused(tmp_path):
    torch.save(network().state_dict(), tmp_path / "bare.pt")
    teacher = Teacher.from_file(tmp_path / "bare.pt", torch.device("cpu"), "models/yolov5n.yaml")
    with pytest.raises(UserError, match="3 classes without names.*2 classes"):
        teacher.fit_to(network(names=["a", "b"]), ["a", "b"])


@pytest.mark.parametrize(("cfg", "scale"), [("models/hub/yolov5n6.yaml", 1.0), ("models/yolov5n.yaml", 0.5)])
def test_pictures_that_are_no_multiple_of_the_teachers_stride_are_filled_with_grey(cfg, scale):
    """A P6 head asks for multiples of 64, a smaller image for twice its strides."""
    pictures = torch.rand(1, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    teacher, student = Teacher(network(cfg=cfg), scale=scale), network(1)
    teacher.fit_to(student, NAMES)
    taught = teacher(pictures)
    inner = F.interpolate(pictures, scale_factor=scale, mode="bilinear", antialias=True)
    filled = torch.full((1, 3, 128 if scale == 1 else 64, 192 if scale == 1 else 96), 114 / 255)
    filled[:, :, : inner.shape[2], : inner.shape[3]] = inner
    expected = outputs_of(network(cfg=cfg), filled)
    for pair, got in zip(teacher.fit.levels, taught.unconverted_levels, strict=True):
        want = expected[pair.teacher][:, :, : got.shape[2], : got.shape[3]]
        torch.testing.assert_close(got, want, atol=FUSED, rtol=1e-3)
    features = student.forward_features(pictures)
    own = teacher.fit.of_student(StudentOutput(features, student.forward_head(features)))
    assert len(own.levels) >= 2
    for mine, theirs, seen in zip(own.levels, taught.levels, taught.features, strict=True):
        assert mine.shape == theirs.shape and mine.shape[2:4] == seen.shape[2:]
    judged = TeacherInStudentFrame(teacher, len(NAMES))
    decoded = judged.decode_levels(judged.forward_head(judged.forward_features(pictures)))
    wanted = teacher.model.decode_levels(expected)
    wanted[..., :4] /= scale
    torch.testing.assert_close(decoded, wanted, atol=0.1, rtol=1e-2)
    # The finest cells, of the larger or smaller image, are as fine as these in the student's.
    assert judged.stride[0] == 8 / scale
    seen = objectness_map(judged, pictures)
    assert seen.shape == (1, 96, 160) and float(seen.min()) >= 0 and float(seen.max()) <= 1


def test_teachers_that_know_all_classes_are_scored_and_their_scores_kept():
    said = []

    def evaluate(judged):
        return SimpleNamespace(over=lambda _: (0.5, judged.class_count / 10))

    context = SimpleNamespace(names=NAMES, is_new=False, say=said.append, warn=said.append, evaluate=evaluate)
    for names, known in ((NAMES, {"teacher a.pt": (0.5, 0.3)}), (["cell", "cat", "dog"], {})):
        teachers = Teachers([Teacher(network(names=names), "a.pt")], network(1), NAMES)
        diagnosis = compare_scores(SimpleNamespace(distill_ratio=1.0), context, teachers)
        distiller = Distiller(teachers, DenseOutputs(LossGains(), "l2", 1.0), 1.0, diagnosis=diagnosis)
        assert distiller.references() == known
        ((title, asked),) = distiller.networks().items()
        assert title == "teacher a.pt" and asked.class_count == len(NAMES)
    assert sum("mAP50 0.500" in line for line in said) == 2


def test_each_class_has_one_partner_and_the_same_spelling_goes_first():
    classes = ClassMap.by_name(["a", "b"], ["A", "a", "b"])
    assert (classes.student, classes.teacher, classes.unknown) == ((1, 2), (0, 1), ("A",))
    doubled = ClassMap.by_name(["x", "x"], ["x", "x"])
    assert doubled.is_identity
    assert ClassMap.by_name(["potted plant", "tv"], ["pottedplant", "tv"]).teacher == (0, 1)
    voc = ["aeroplane", "diningtable", "motorbike", "sofa", "tvmonitor"]
    found = ClassMap.by_name(["tv", "airplane", "motorcycle", "couch", "dining table"], voc)
    assert found.teacher == (1, 4, 2, 3, 0) and not found.unknown
    assert ClassMap.by_name(["tv", "tvmonitor"], ["tv", "tvmonitor"]).teacher == (0, 1)
    assert ClassMap.by_name(["airplane"], ["airplane", "aeroplane"]).unknown == ("aeroplane",)


def test_the_mapping_says_which_class_is_which():
    teacher = Teacher(network(names=["Dining_Table", "cat", "cell"]))
    teacher.fit_to(network(1), ["cell", "dining table", "ring"])
    for words in (
        "2 of 3 classes",
        "ignored; matched: 1 class (cell), dining table = Dining_Table",
        "ring",
        "cat",
    ):
        assert words in teacher.mapping
    same = Teacher(network())
    same.fit_to(network(1), NAMES)
    assert same.mapping == ""
    turned = Teacher(network(names=NAMES[::-1]))
    turned.fit_to(network(1), NAMES)
    assert "3 of 3" in turned.mapping


@pytest.mark.parametrize(
    ("names", "known"),
    [(NAMES, None), (NAMES[::-1], None), ([NAMES[2], "cat"], (2,)), (["cat", "dog"], ())],
)
def test_a_teacher_tells_which_of_the_datas_classes_it_can_predict(names, known):
    teacher = Teacher(network(names=names), "a.pt")
    teacher.fit_to(network(1), NAMES)
    assert TeacherInStudentFrame(teacher, len(NAMES)).known_classes == known
