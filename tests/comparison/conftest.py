"""Folders as training runs leave them."""

import json

import pytest

from utils.config.hyperparameters import Hyperparameters
from utils.config.options import DistillOptions, TrainOptions, options_to_dict, yaml_text
from utils.config.settings import to_plain
from utils.reporting.results import TIMES, ResultsWriter

METRIC = "metrics/mAP_0.5:0.95"


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, scores, seed=0, teacher=None, seconds=None, hyp={}, **options) gives the folder."""

    def make(name, scores, seed=0, teacher=None, seconds=None, hyp=None, **options):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        given = {"epochs": len(scores), "name": name, "seed": seed, **options}
        kind = DistillOptions(teacher=(teacher,), **given) if teacher else TrainOptions(**given)
        (folder / "opt.yaml").write_text(yaml_text(options_to_dict(kind)))
        (folder / "hyp.yaml").write_text(yaml_text({**to_plain(Hyperparameters()), **(hyp or {})}))
        results = ResultsWriter(folder / "results.csv", ["epoch", "metrics/mAP_0.5", METRIC, "val/box_loss"])
        for epoch, score in enumerate(scores):
            scored = {METRIC: score, "metrics/mAP_0.5": score}
            results.append({"epoch": epoch, **scored, "val/box_loss": 1 / (epoch + 1)})
        if seconds is not None:
            times = ResultsWriter(folder / "times.csv", TIMES)
            for epoch in range(len(scores)):
                times.append(dict(zip(TIMES, (epoch, seconds, 1.0), strict=True)))
        if teacher:
            known = {f"teacher {teacher}": {"map50": 0.9, "map50_95": 0.6}}
            (folder / "references.json").write_text(json.dumps(known))
        return folder

    return make
