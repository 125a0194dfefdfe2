"""Boxes and their labels on images."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from utils.reporting import draw
from utils.reporting.draw import color_of, draw_boxes, draw_plate, drawable, name_of

GROUND = 114


def picture(height: int = 240, width: int = 320) -> draw.Image:
    return np.full((height, width, 3), GROUND, np.uint8)


def changed(image: draw.Image) -> tuple[int, int, int, int]:
    """The rectangle (left, top, right, bottom, inclusive) of pixels that are no longer ground."""
    ys, xs = np.nonzero((image != GROUND).any(axis=2))
    return int(xs.min()), int(ys.min()), int(xs.max()), int(ys.max())


def has_color(image: draw.Image, class_id: int) -> bool:
    return bool((image == np.array(color_of(class_id), np.uint8)).all(axis=2).any())


def test_the_first_classes_have_colors_that_nobody_confuses() -> None:
    colors = np.array([color_of(number) for number in range(12)], np.float64)
    distances = [np.abs(a - b).sum() for a, b in itertools.combinations(colors, 2)]
    assert min(distances) > 80


def test_eighty_classes_have_eighty_colors() -> None:
    assert len({color_of(number) for number in range(80)}) == 80


def test_text_stands_out_from_every_class_color() -> None:
    for number in range(80):
        blue, green, red = color_of(number)
        brightness = 0.114 * blue + 0.587 * green + 0.299 * red
        ink = draw._ink_on(color_of(number))[0]
        assert abs(ink - brightness) > 100


def test_a_box_is_drawn_where_it_lies() -> None:
    image = draw_boxes(picture(), np.array([[50.0, 60, 150, 160]]), [0], ["cell"], hide_labels=True)
    assert has_color(image, 0)
    left, top, right, bottom = changed(image)
    assert (left, top, right, bottom) == (50, 60, 150, 160)
    assert (image[100:120, 80:120] == GROUND).all()


def test_the_label_lies_above_its_box() -> None:
    image = draw_boxes(picture(), np.array([[50.0, 100, 150, 160]]), [0], ["cell"])
    assert changed(image)[1] < 92


def test_the_label_goes_inside_where_there_is_no_room_above() -> None:
    box = np.array([[50.0, 0, 150, 160]])
    bare = draw_boxes(picture(), box, [0], ["cell"], hide_labels=True)
    labelled = draw_boxes(picture(), box, [0], ["cell"])
    _, top, _, bottom = changed(np.where(bare == labelled, np.uint8(GROUND), labelled))
    assert 0 <= top < bottom < 30


def test_the_whole_label_is_seen_at_the_right_border() -> None:
    def plate_pixels(left: float) -> int:
        image = draw_boxes(picture(), np.array([[left, 100, left + 18, 160]]), [1], ["erythrocyte"], [0.5])
        return int((image[60:98] != GROUND).any(axis=2).sum())

    assert plate_pixels(300) == plate_pixels(100) > 0


@pytest.mark.parametrize(("height", "width"), [(240, 320), (40, 30), (6, 9), (1, 1)])
def test_pictures_of_any_size_take_labels_longer_than_they_are(height: int, width: int) -> None:
    boxes = np.array([[-20.0, -20, 5, 5], [width - 3, height - 3, width + 50, height + 50]])
    image = draw_boxes(
        picture(height, width), boxes, [0, 1], ["a name of thirty-two letters!!", "b"], [0.5, 1]
    )
    assert image.shape == (height, width, 3)
    assert (image != GROUND).any()


def test_a_plate_too_wide_keeps_the_beginning_of_its_text() -> None:
    narrow = draw._fitting_mask("a name that is far too long for this", 8.0, 60)
    short = draw._fitting_mask("a n", draw.SMALLEST_TEXT, 60)
    assert narrow.shape[1] <= 60
    width = short.shape[1] - 5  # less its right margin
    assert (narrow[: short.shape[0], :width] == short[:, :width]).all()


def test_later_boxes_and_all_labels_lie_on_top() -> None:
    boxes = np.array([[50.0, 100, 150, 160], [40, 60, 150, 130]])
    image = draw_boxes(picture(), boxes, [0, 1], ["a", "b"], line_thickness=3)
    assert tuple(image[88, 50]) == color_of(0)  # the first label, inside the second box
    assert tuple(image[115, 150]) == color_of(1)  # where both have their right border
    assert tuple(image[130, 100]) == color_of(1)


def test_confidences_are_written_unless_hidden() -> None:
    box = np.array([[50.0, 100, 150, 160]])
    plain = draw_boxes(picture(), box, [0], ["cell"])
    shown = draw_boxes(picture(), box, [0], ["cell"], [0.87])
    hidden = draw_boxes(picture(), box, [0], ["cell"], [0.87], hide_conf=True)
    assert (plain == hidden).all()
    assert (plain != shown).any()


def test_lines_are_as_thick_as_asked_for_and_else_fit_the_picture() -> None:
    def thickness(size: int, asked: int | None) -> int:
        box = np.array([[0.25, 0.25, 0.75, 0.75]]) * size
        image = draw_boxes(picture(size, size), box, [0], ["a"], line_thickness=asked, hide_labels=True)
        row = image[size // 2, : size // 2]
        return int((row == np.array(color_of(0), np.uint8)).all(axis=1).sum())

    assert thickness(200, 5) == 5
    assert thickness(1600, None) > thickness(200, None) >= 1


def test_no_detections_leave_the_picture_as_it_is() -> None:
    image = draw_boxes(picture(), np.zeros((0, 4)), np.zeros(0, np.int64), ["a"], np.zeros(0))
    assert (image == GROUND).all()


def test_a_class_without_a_name_shows_its_number() -> None:
    assert name_of(1, ["a", "b"]) == "b"
    assert name_of(7, ["a"]) == "7"
    assert name_of(0, ["x" * 40]) == "x" * 40 and name_of(0, ["x" * 300]) == "x" * 37 + "..."
    assert has_color(draw_boxes(picture(), np.array([[9.0, 50, 90, 90]]), [7], ["a"]), 7)


@pytest.mark.parametrize("name", ["тарелка", "größe", "ÄÖÜ", "Ελλάδα"])
def test_names_in_other_letters_are_written(name: str) -> None:
    assert drawable(name) == name
    mask = draw._text_mask(name, 12.0)
    questions = draw._text_mask("?" * len(name), 12.0)
    assert mask.max() > 200
    assert mask.shape != questions.shape or (mask != questions).any()


def test_letters_that_the_font_lacks_become_question_marks() -> None:
    assert drawable("猫 cat\n") == "? cat?"


def test_a_plate_never_touches_what_is_beside_it() -> None:
    image = picture()
    draw_plate(image, "text", (100, 100), (0, 0, 0), 10.0)
    height, width = draw._text_mask("text", 10.0).shape
    assert changed(image) == (100, 100 - height, 100 + width - 1, 99)
