"""Plots of where two weight files disagree, without a training run."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from models.checkpoint import build_model, read_checkpoint
from models.places import resolve_weights
from models.yolo import Model
from utils.config.files import next_run_folder
from utils.config.options import CompareOptions
from utils.datasets.download import get_dataset
from utils.datasets.index import build_index
from utils.datasets.loader import eval_loader
from utils.device import select_device
from utils.distillation.teacher import Teacher, TeacherInStudentFrame
from utils.errors import UserError
from utils.evaluation.disagreement import DisagreementPlots
from utils.evaluation.evaluate import evaluate
from utils.inference.classes import WantedClasses, fit_classes
from utils.inference.predictor import prepare_model
from utils.inference.preprocess import fitting_image_size
from utils.reporting.console import Console
from utils.words import counted, listed


def draw_disagreement(options: CompareOptions, console: Console) -> Path:
    """Evaluate a student and run its teacher on the same images; return the folder with the plots."""
    device = select_device(options.device)
    config = get_dataset(options.data, options.data_dir, [options.task], options.fetches, console.info)
    weights, teacher_path = (
        resolve_weights(name, options.fetches) for name in (options.weights, options.teacher)
    )
    checkpoint = read_checkpoint(weights)
    student = build_model(checkpoint)
    student.check_takes_colour(weights)
    fit_classes(student, WantedClasses(config.names, f"the data {config.yaml_path}"), weights, console)
    index = build_index(config, options.task)
    student = prepare_model(student, device)
    teacher = Teacher.from_file(teacher_path, device)
    teacher.fit_to(student, index.names)
    if not teacher.fit.classes.student:
        raise UserError(
            "it knows none of the data's classes", teacher_path, "take one that was trained on them"
        )
    known = teacher.known
    if known.unknown:
        unknown = listed(known.unknown)
        console.warn(f"teacher {teacher_path} does not know {unknown}: only the others are compared")
    elif teacher.mapping:
        console.info(f"teacher {teacher_path}: {teacher.mapping}")
    (image_size,) = fitting_image_size([options.imgsz], student.size_multiple, console)
    loader = eval_loader(
        index,
        image_size=image_size,
        batch_size=options.batch_size,
        workers=options.workers,
        stride=student.size_multiple,
    )
    framed = TeacherInStudentFrame(teacher, len(index.names))
    other = cast(Model, framed)
    titles = (f"student {weights}", teacher.title)
    plots = DisagreementPlots(student, other, titles, index.names, classes=framed.known_classes)
    result = evaluate(student, loader, names=index.names, observers=[plots], progress=console)
    taught = evaluate(other, loader, names=index.names, progress=console)
    part = f" over {counted(len(known.student), 'class')} that both know" if known.unknown else ""
    for who, scores in ((f"student {weights}", result), (f"teacher {teacher_path}", taught)):
        map50, map50_95 = scores.over(known.student)
        console.info(f"{who}: mAP50 {map50:.3f}, mAP50-95 {map50_95:.3f}{part}")
    folder = next_run_folder(Path(options.project), options.name, options.exist_ok)
    drawn = plots.save(folder)
    console.info(
        f"{' and '.join(path.name for path in drawn)} in {folder}" if drawn else "they agree everywhere"
    )
    return folder
