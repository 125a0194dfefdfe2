"""What a test asks of its loader."""

from __future__ import annotations

import numpy as np
import pytest

from utils.config.options import TestOptions as Options  # not a class of tests
from utils.datasets.index import DatasetIndex
from utils.evaluation.run import _loader


@pytest.mark.parametrize(
    ("task", "rect", "shapes"),
    [("val", True, {(192, 352), (352, 192)}), ("val", False, {(320, 320)}), ("speed", True, {(320, 320)})],
)
def test_speed_is_measured_in_squares(task, rect, shapes) -> None:
    labels = [np.zeros((0, 5), np.float32)] * 4
    sizes_wh = np.array([(200, 100), (100, 200)] * 2)
    index = DatasetIndex(["x"] * 4, labels, sizes_wh, np.full(4, True), [], ["cat"])
    options = Options(task=task, rect=rect, batch_size=2, workers=0)
    assert {batch.shape_hw for batch in _loader(options, index, 320, 32).sampler} == shapes
