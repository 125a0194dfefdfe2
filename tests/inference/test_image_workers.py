"""Images read, drawn and written by other processes: the same files as by threads, all errors told."""

import os
import signal
import subprocess
import time

import cv2
import numpy as np
import pytest
import torch

from utils.config.options import DetectOptions
from utils.errors import UserError
from utils.inference import detector, image_process, image_workers, run
from utils.inference.drawing import DrawStyle
from utils.inference.image_process import WorkerSettings
from utils.inference.image_workers import ImageWorkers, are_plain_images, worker_count
from utils.inference.predictor import Predictor
from utils.inference.sources import FileSource
from utils.reporting.console import Console

WEIGHTS = "weights/demo_student.pt"
SETTINGS = WorkerSettings((64, 64), 32, False, ("a", "b"), DrawStyle())


@pytest.fixture(autouse=True)
def soon_over():
    """A test that waits for a process that waits for it ends all the same."""
    signal.alarm(60)
    yield
    signal.alarm(0)


def images(folder, count=40, sides=((48, 64), (64, 48), (30, 90))):
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        height, width = sides[number // 7 % len(sides)]
        picture = random.integers(0, 256, (height, width, 3), np.uint8)
        cv2.circle(picture, (width // 2, height // 2), 12, (40, 40, 220), -1)
        cv2.imwrite(str(folder / f"{number:03d}.png"), picture)
    return folder


def values_of(files):
    texts = [content.decode() for name, content in files.items() if name.endswith(".txt")]
    return [float(value) for text in texts for value in text.split()]


class BestAlone(Predictor):
    """Detects as on a GPU."""

    def __init__(self, *given, **options):
        super().__init__(*given, **options)
        self.best_alone = True


def use_workers(monkeypatch, count=3):
    monkeypatch.setattr(run, "worker_count", lambda _: count)
    monkeypatch.setattr(run, "LEAST_IMAGES", 10)


def detect(source, project, **options):
    given = dict(save_txt=True, save_conf=True, save_csv=True, conf_thres=0.01, imgsz=(64,), device="cpu")
    said = []
    console = Console()
    console.info = console.warn = said.append
    options = DetectOptions(weights=(WEIGHTS,), source=str(source), project=project, **(given | options))
    folder = run.run_detect(options, console)
    written = [] if folder is None else [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in written}, said


@pytest.mark.parametrize(("budget", "best_alone"), [(1 << 30, False), (0, False), (1 << 30, True)])
def test_files_are_those_that_threads_write(tmp_path, monkeypatch, budget, best_alone):
    source = images(tmp_path / "in")
    (source / "017.png").write_bytes(b"nothing")
    (source / "000.png").write_bytes(b"")
    monkeypatch.setattr(detector, "BATCH_ON_CPU", 4)
    expected, told = detect(source, tmp_path / "threads")
    use_workers(monkeypatch)
    monkeypatch.setattr(image_workers, "BUDGET_BYTES", budget)  # too small, and images are read again
    monkeypatch.setattr(run, "_detect_all", None)
    if best_alone:  # as on a GPU, which computes a batch while the one before is completed
        monkeypatch.setattr(run, "Predictor", BestAlone)
    found, said = detect(source, tmp_path / "workers")
    assert len(expected) > 60
    if best_alone:  # another order of operations
        assert list(found) == list(expected)
        assert values_of(found) == pytest.approx(values_of(expected), abs=1e-4)
    else:
        assert found == expected
    # The same but for times and folders.
    lines = [[line.rpartition(",")[0] for line in text if "/40 " in line] for text in (told, said)]
    assert lines[0] == lines[1] and len(lines[0]) == 38
    assert [line for line in said if "skipped" in line] == [line for line in told if "skipped" in line]
    assert any("detections" not in line and "17.png" in line for line in said if "skipped" in line)


def test_nothing_is_written_where_nothing_is_wanted(tmp_path, monkeypatch):
    source = images(tmp_path / "in", 12)
    use_workers(monkeypatch)
    found, said = detect(
        source, tmp_path / "out", nosave=True, save_txt=False, save_conf=False, save_csv=False
    )
    assert not found and not (tmp_path / "out").exists()
    assert sum("/12 " in line for line in said) == 12


@pytest.mark.parametrize(
    "options", [{"save_crop": True}, {"dry_run": True}, {"source": "a.mp4"}, {"source": "http://a/b.jpg"}]
)
def test_what_needs_the_images_here_uses_threads(tmp_path, monkeypatch, options):
    source = images(tmp_path / "in", 12)
    use_workers(monkeypatch)
    monkeypatch.setattr(run, "ImageWorkers", None)
    if "source" in options:
        assert not are_plain_images([str(source / "000.png"), options["source"]])
    else:
        detect(source, tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("device", "cpus", "count"), [("cpu", 64, 0), ("cuda", 3, 0), ("cuda", 4, 3), ("cuda", 64, 16)]
)
def test_workers_are_for_a_gpu_and_leave_a_cpu_to_it(monkeypatch, device, cpus, count):
    monkeypatch.setattr(image_workers, "usable_cpus", lambda: cpus)
    assert worker_count(torch.device(device)) == count


def test_an_image_larger_than_was_reserved_is_left_to_threads(tmp_path, monkeypatch):
    """An exported network of a fixed size may have another than the options."""
    source = images(tmp_path / "in", 12)
    use_workers(monkeypatch)
    real = ImageWorkers

    def small(paths, _size, count):
        return real(paths, (1, 1), count)

    monkeypatch.setattr(run, "ImageWorkers", small)
    found, _ = detect(source, tmp_path / "out", imgsz=(256,))
    assert len([name for name in found if name.endswith(".png")]) == 12


def test_an_image_that_cannot_be_written_ends_the_run_with_its_reason(tmp_path, monkeypatch):
    source = images(tmp_path / "in", 60)
    use_workers(monkeypatch)
    out = tmp_path / "out" / "exp"
    (out / "033.png").mkdir(parents=True)
    with pytest.raises(UserError, match=r"033\.png: cannot be written"):
        detect(source, tmp_path / "out", exist_ok=True)
    assert (out / "020.png").is_file()


@pytest.mark.parametrize(("count", "batch"), [(2, 16), (6, 16), (3, 64)])
def test_images_that_only_some_workers_can_read_keep_nobody_waiting(tmp_path, monkeypatch, count, batch):
    """A batch is then mostly one worker's, or larger than what all of them keep ready."""
    source = images(tmp_path / "in", 200)
    for number in range(0, 200, 2) if batch == 16 else ():
        (source / f"{number:03d}.png").write_bytes(b"nothing")
    use_workers(monkeypatch, count)
    monkeypatch.setattr(run, "Predictor", BestAlone)
    monkeypatch.setattr(detector, "BATCH_ON_CPU", batch)
    found, _ = detect(source, tmp_path / "out", save_txt=False, save_conf=False, save_csv=False)
    assert len(found) == (100 if batch == 16 else 200)


def test_a_run_of_unreadable_images_and_many_detections_do_not_block_each_other(tmp_path):
    """Both ends of a pipe would wait for the other to read."""
    good = [str(path) for path in sorted(images(tmp_path / "in", 20).iterdir())]
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nothing")
    source = FileSource([*good, *[str(bad)] * 800], warn=lambda _: None)
    many = np.zeros((30_000, 6), np.float32)
    with ImageWorkers(source.paths, (64, 64), 2) as workers:
        workers.configure(SETTINGS)
        waiting = [one for one, _ in zip(workers.prepared(source), range(20), strict=False)]
        time.sleep(1)
        for _ in waiting:
            workers.finish(many, None)


def test_what_was_found_before_an_interrupt_is_written_where_nothing_was_yet(tmp_path, monkeypatch):
    source = images(tmp_path / "in", 60)
    use_workers(monkeypatch)
    monkeypatch.setattr(detector, "BATCH_ON_CPU", 4)
    draw, start, begun = image_process.draw_detections, run.Detector.start, []

    def slowly(*given):
        time.sleep(0.3)
        return draw(*given)

    def interrupted(self, group):
        begun.append(group)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return start(self, group)

    monkeypatch.setattr(image_process, "draw_detections", slowly)
    monkeypatch.setattr(run.Detector, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        detect(source, tmp_path / "out", save_txt=False, save_conf=False, save_csv=False)
    assert len(list((tmp_path / "out" / "exp").iterdir())) == 4


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (OSError("no font"), RuntimeError, "no font"),
        (cv2.error("Failed to allocate 9 bytes"), UserError, "out of memory"),
        (MemoryError(), UserError, "out of memory"),
    ],
)
def test_an_error_of_a_worker_ends_the_run_and_is_told(tmp_path, monkeypatch, error, kind, told):
    def failing(*_):
        raise error

    source = images(tmp_path / "in", 60)
    use_workers(monkeypatch)
    monkeypatch.setattr(image_process, "draw_detections", failing)
    with pytest.raises(kind, match=told):
        detect(source, tmp_path / "out")


def test_a_system_without_room_for_workers_uses_threads(tmp_path, monkeypatch):
    source = images(tmp_path / "in", 12)
    use_workers(monkeypatch)

    def refused(*_):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(image_workers.mmap, "mmap", refused)
    found, _ = detect(source, tmp_path / "out")
    assert len([name for name in found if name.endswith(".png")]) == 12


def test_a_worker_that_is_killed_ends_the_run(tmp_path, monkeypatch):
    source = images(tmp_path / "in", 60)
    use_workers(monkeypatch)
    begin = ImageWorkers.configure

    def killed(self, settings):
        os.kill(self._processes[1].pid, signal.SIGKILL)
        return begin(self, settings)

    monkeypatch.setattr(ImageWorkers, "configure", killed)
    with pytest.raises(UserError, match="a process that reads and writes images has ended"):
        detect(source, tmp_path / "out")


def test_workers_end_with_an_error_of_the_network(tmp_path, monkeypatch):
    source = images(tmp_path / "in", 60)
    use_workers(monkeypatch)
    started = []
    create = ImageWorkers.__init__

    def remembered(self, *given):
        create(self, *given)
        started.extend(self._processes)

    def failing(*_):
        raise ValueError("the network fails")

    monkeypatch.setattr(ImageWorkers, "__init__", remembered)
    monkeypatch.setattr(run.Detector, "start", failing)
    with pytest.raises(ValueError, match="the network fails"):
        detect(source, tmp_path / "out")
    assert len(started) == 3 and not any(process.is_alive() for process in started)


def test_workers_do_not_outlive_the_process_that_started_them(tmp_path):
    source = FileSource([str(path) for path in sorted(images(tmp_path / "in", 60).iterdir())])
    child = os.fork()
    if child == 0:
        workers = ImageWorkers(source.paths, (64, 64), 2)
        (tmp_path / "pids").write_text(" ".join(str(process.pid) for process in workers._processes))
        workers.configure(SETTINGS)
        next(workers.prepared(source))
        os._exit(0)
    os.waitpid(child, 0)
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        limit = time.monotonic() + 20
        while os.path.exists(f"/proc/{pid}") and _state(pid) != "Z" and time.monotonic() < limit:
            time.sleep(0.05)
        assert not os.path.exists(f"/proc/{pid}") or _state(pid) == "Z"


def _state(pid):
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.mark.parametrize("kind", ["INT", "TERM"])
def test_an_interrupt_leaves_what_was_found_written(tmp_path, kind):
    """It may reach all processes; the workers leave it to the one with the network."""
    source = FileSource([str(path) for path in sorted(images(tmp_path / "in", 60).iterdir())])
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt), ImageWorkers(source.paths, (64, 64), 3) as workers:
        workers.configure(SETTINGS)
        for number, one in enumerate(workers.prepared(source)):
            workers.finish(np.zeros((0, 6), np.float32), out / os.path.basename(one.frame.source))
            if number == 20:
                # From another process: of their parent they accept it.
                pids = [str(process.pid) for process in workers._processes]
                subprocess.run(["kill", f"-{kind}", *pids], check=True)
                raise KeyboardInterrupt
    assert len(list(out.iterdir())) == 21
