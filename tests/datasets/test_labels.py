"""Label lines: what is accepted, what is corrected, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from utils.datasets.labels import correct_boxes, parse_yolo


def test_a_line_becomes_a_class_and_a_corner_box():
    boxes, wrong = parse_yolo(b"1 0.5 0.4 0.2 0.6\n\n0 0.25 0.25 0.5 0.5\n", 2)
    assert wrong == []
    np.testing.assert_allclose(boxes, [[1, 0.4, 0.1, 0.6, 0.7], [0, 0, 0, 0.5, 0.5]], atol=1e-12)


def test_a_polygon_becomes_its_bounding_box():
    boxes, wrong = parse_yolo(b"0 0.1 0.2 0.5 0.1 0.3 0.9\n", 1)
    assert wrong == []
    np.testing.assert_allclose(boxes, [[0, 0.1, 0.1, 0.5, 0.9]])


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf0 0.5 0.5 1 1\r\n"])
def test_empty_files_windows_line_ends_and_byte_order_marks_are_fine(content):
    boxes, wrong = parse_yolo(content, 1)
    assert wrong == []
    assert len(boxes) == (b"0" in content)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("0 0.5 0.5 0.2", "4 numbers"),
        ("0 0.5 0.5 0.2 0.2 0.9", "6 numbers"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "8 numbers"),
        ("0", "1 numbers"),
        ("cat 0.5 0.5 0.2 0.2", "not a row of numbers"),
        ("1_0 0.5 0.5 0.2 0.2", "not a row of numbers"),
        ("0 0.5 0.5 0.2 0.2_5", "not a row of numbers"),
        ("0 0.5 nan 0.2 0.2", "not finite"),
        ("0 0.5 inf 0.2 0.2", "not finite"),
        ("2 0.5 0.5 0.2 0.2", "class 2 is not one of 0..1"),
        ("-1 0.5 0.5 0.2 0.2", "class -1"),
        ("0.5 0.5 0.5 0.2 0.2", "class 0.5"),
        ("0 320 240 50 50", "fractions"),
        ("0 0.5 0.5 -0.2 0.2", "negative size"),
        ("\x00\xff", "not a row of numbers"),
    ],
)
def test_a_wrong_line_is_reported_with_its_number(line, what):
    boxes, wrong = parse_yolo(f"0 0.5 0.5 0.1 0.1\n{line}\n1 0.5 0.5 0.1 0.1".encode("latin-1"), 2)
    assert len(boxes) == 2
    [(number, text)] = wrong
    assert number == 2
    assert what in text


@pytest.mark.fault(
    "form feeds, U+2028 and similar characters in label files",
    "not counted as line breaks; line numbers match those of text editors",
)
@pytest.mark.parametrize("odd", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"])
def test_lines_are_numbered_as_editors_number_them(odd):
    text = f"0 .5 .5 .1 .1{odd}\n{odd}0 .5 .5 .2 .2\r\n{odd}\r9 .5 .5 .1 .1\n0 .5 .5{odd}.1 .1"
    boxes, wrong = parse_yolo(text.encode(), 2)
    assert len(boxes) == 2
    assert [number for number, _ in wrong] == [4, 5]
    assert "class 9" in wrong[0][1] and "not a row of numbers" in wrong[1][1]


def test_boxes_that_an_odd_line_end_joins_are_no_polygon():
    boxes, wrong = parse_yolo("\x0c".join(["0 .5 .5 .1 .1"] * 3).encode(), 1)
    assert len(boxes) == 0 and [number for number, _ in wrong] == [1]


def test_a_good_box_passes_unchanged_and_without_a_word():
    labels, notes = correct_boxes(np.array([[1, 0.25, 0.25, 0.75, 0.5], [0, 0, 0, 1, 1.0]]))
    assert notes == []
    assert labels.dtype == np.float32
    np.testing.assert_allclose(labels, [[1, 0.5, 0.375, 0.5, 0.25], [0, 0.5, 0.5, 1, 1]])


def test_a_box_that_sticks_out_is_clipped_and_said_so():
    labels, notes = correct_boxes(np.array([[0, -0.5, 0.2, 0.5, 0.4], [0, 0.1, 0.1, 1.0005, 0.9]]))
    np.testing.assert_allclose(labels[0], [0, 0.25, 0.3, 0.5, 0.2], atol=1e-6)
    assert notes == ["1 box reached out of the image and was clipped"]  # rounding is not worth a word
    assert (labels[:, 1:3] + labels[:, 3:] / 2 <= 1).all()


def test_a_box_outside_of_the_image_is_left_out_and_told_once():
    rows = [[0, 1.2, 0.1, 1.4, 0.3], [0, 0.2, 0.2, 0.2, 0.4], [0, 0.9, 0.1, 1.1, 0.3]]
    labels, notes = correct_boxes(np.array(rows))
    np.testing.assert_allclose(labels, [[0, 0.95, 0.2, 0.1, 0.2]], atol=1e-6)
    assert notes == [
        "1 box reached out of the image and was clipped",
        "1 box lay outside of the image and was left out",
        "1 box was empty and left out",
    ]


def test_empty_and_repeated_labels_go_and_the_order_stays():
    rows = [[1, 0.5, 0.5, 0.9, 0.9], [0, 0.2, 0.2, 0.2, 0.4], [1, 0.5, 0.5, 0.9, 0.9], [0, 0, 0, 0.1, 0.1]]
    labels, notes = correct_boxes(np.array(rows))
    assert labels[:, 0].tolist() == [1, 0]
    assert len(notes) == 2


def test_no_boxes_give_an_empty_array_of_five_columns():
    labels, notes = correct_boxes(np.zeros((0, 5)))
    assert (labels.shape, notes) == ((0, 5), [])


@pytest.mark.fault("a label file with a million wrong lines", "refused; the first 1,000 are listed")
def test_of_very_many_wrong_lines_the_first_are_kept():
    boxes, wrong = parse_yolo(b"0 0.5 0.5 1 1\n" + b"a\n" * 1_000_000, 1)
    assert len(boxes) == 1 and len(wrong) == 1001
    assert wrong[999:] == [
        (1001, "'a' is not a row of numbers"),
        (1002, "after 1,000 wrong lines, further ones are not listed"),
    ]
    assert len(parse_yolo(b"a\n" * 1000, 1)[1]) == 1000
