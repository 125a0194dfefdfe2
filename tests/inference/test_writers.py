"""Files that detection leaves: names, labels, tables, crops, images, videos."""

from __future__ import annotations

import csv
import os
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from utils.errors import UserError
from utils.inference.frames import Frame
from utils.inference.outputs import OutputChoice, Outputs
from utils.inference.writers import NameBook, VideoWriter, crop_of, label_lines, safe_name, write_image

IMAGE = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
DETECTIONS = torch.tensor([[10.0, 20, 30, 40, 0.9, 1], [0, 0, 80, 60, 0.25, 0]])


def write(outputs: Outputs, frame: Frame, detections: torch.Tensor, drawn: np.ndarray | None) -> None:
    """Writes a frame, and the rest of it."""
    rest = outputs.write(frame, detections, lambda: frame.image if drawn is None else drawn)
    if rest is not None:
        rest()


@pytest.mark.parametrize(
    "text",
    ["../../etc/passwd", "a/b\\c", "tab\tnew\nline\0", "..", "", ".", "con", "LPT1.txt", "x" * 500, "a:b*?"],
)
def test_names_are_one_harmless_component(text: str, tmp_path: Path) -> None:
    name = safe_name(text)
    assert (tmp_path / name).parent == tmp_path and name not in ("", ".", "..")
    assert name.isprintable() and len(name) <= 121
    assert name.partition(".")[0].lower() not in ("con", "lpt1")
    (tmp_path / name).write_text("can be made")


def test_ordinary_names_stay_as_they_are() -> None:
    assert [safe_name(t) for t in ("person", "hot dog", "köpek-2", "犬")] == [
        "person",
        "hot dog",
        "köpek-2",
        "犬",
    ]


def test_two_keys_never_share_a_name() -> None:
    book = NameBook()
    names = [
        book.name(key, stem, ".jpg") for key, stem in (("x/a", "a"), ("y/a", "a"), ("z", "A"), ("w", "a_2"))
    ]
    assert names == ["a.jpg", "a_2.jpg", "A_3.jpg", "a_2_2.jpg"]
    assert book.name("y/a", "a", ".jpg") == "a_2.jpg"


def test_a_number_never_leads_to_the_name_of_a_file_to_come() -> None:
    book = NameBook()
    for stem in ("a", "a", "a_2"):
        book.expect(stem)
    assert [book.name(key, stem) for key, stem in ((1, "a"), (2, "a"), (3, "a_2"))] == ["a", "a_3", "a_2"]


def test_a_picture_beside_a_video_of_its_name_gets_another() -> None:
    """The video's frames are `clip_1`, `clip_2`, ...: such names would never be free."""
    book = NameBook()
    book.expect("clip", series=True)
    book.expect("clip")
    assert book.name("clip.mp4", "clip", series=True) == "clip"
    assert book.name("clip.png", "clip") == "clip-2" and book.name("a/clip.png", "clip") == "clip-3"
    assert book.name("a/clip.mp4", "clip", series=True) == "clip_2"


@pytest.mark.parametrize("order", [("v.mp4", "v_1.jpg"), ("v_1.jpg", "v.mp4")])
@pytest.mark.parametrize("expected", [True, False])
def test_frames_of_a_video_and_pictures_never_share_a_label_file(
    tmp_path: Path, order: tuple[str, str], expected: bool
) -> None:
    files = [str(tmp_path / name) for name in order]
    for file in files:
        Path(file).write_bytes(b"")
    choice = OutputChoice(images=False, labels=True)
    with Outputs(tmp_path / "out", ["a", "b"], choice, files if expected else ()) as outputs:
        for file in files:
            for number in (0, 1) if file.endswith(".mp4") else (None,):
                write(outputs, Frame(IMAGE, file, number), DETECTIONS, None)
    names = sorted(path.name for path in (tmp_path / "out" / "labels").iterdir())
    assert len(names) == 3
    if expected:
        assert names == ["v_1.txt", "v_2_1.txt", "v_2_2.txt"]


def test_a_video_alone_numbers_its_frames_behind_its_name(tmp_path: Path) -> None:
    for name in ("v.mp4", "v_1.mp4"):
        (tmp_path / name).write_bytes(b"")
    files = [str(tmp_path / "v.mp4"), str(tmp_path / "v_1.mp4")]
    with Outputs(tmp_path / "out", ["a", "b"], OutputChoice(images=False, labels=True), files) as outputs:
        for file in files:
            write(outputs, Frame(IMAGE, file, 0), DETECTIONS, None)
    assert sorted(p.name for p in (tmp_path / "out" / "labels").iterdir()) == ["v_1.txt", "v_1_1.txt"]


def test_what_comes_from_an_address_has_the_name_of_the_file_there(tmp_path: Path) -> None:
    choice = OutputChoice(labels=True, table=True)
    with Outputs(tmp_path, ["a", "b"], choice) as outputs:
        write(outputs, Frame(IMAGE, "http://x/y/a%20b.PNG?c=d.gif"), DETECTIONS, IMAGE)
        write(outputs, Frame(IMAGE, "http://x/v.mp4", 0), DETECTIONS, IMAGE)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a b.PNG",
        "labels",
        "predictions.csv",
        "v.mp4",
    ]
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == ["a b.txt", "v_1.txt"]
    assert "\na b.PNG,b,0.9000,," in (tmp_path / "predictions.csv").read_text()


def test_an_address_may_be_longer_than_any_file_name(tmp_path: Path) -> None:
    with Outputs(tmp_path, ["a", "b"], OutputChoice(images=False, labels=True)) as outputs:
        write(outputs, Frame(IMAGE, f"rtsp://cam/{'k' * 400}.sdp", 0, live=True), DETECTIONS, None)
    assert len(list((tmp_path / "labels").iterdir())) == 1


def test_a_file_name_that_is_no_text_is_written_out(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/p\xff.png")
    Path(path).write_bytes(b"")
    choice = OutputChoice(labels=True, crops=True, table=True)
    with Outputs(tmp_path / "out", ["a", "b"], choice) as outputs:
        write(outputs, Frame(IMAGE, path), DETECTIONS, IMAGE)
    assert "p\\udcff.png,b," in (tmp_path / "out" / "predictions.csv").read_text(encoding="utf-8")
    assert len(list((tmp_path / "out" / "labels").iterdir())) == 1


@pytest.mark.parametrize("blocked", ["labels", "predictions.csv", "crops"])
def test_what_cannot_be_written_is_one_error(tmp_path: Path, blocked: str) -> None:
    if blocked == "predictions.csv":
        (tmp_path / blocked).mkdir()
    else:
        (tmp_path / blocked).write_text("in the way")
    choice = OutputChoice(images=False, labels=True, crops=True, table=True)
    with (
        pytest.raises(UserError, match=rf"{blocked}.*cannot be written"),
        Outputs(tmp_path, ["a", "b"], choice) as outputs,
    ):
        write(outputs, Frame(IMAGE, "x.jpg"), DETECTIONS, None)


def test_label_lines_are_normalised_with_the_confidence_last() -> None:
    plain = label_lines(DETECTIONS, (60, 80), with_confidence=False).splitlines()
    assert plain == ["1 0.25 0.5 0.25 0.333333", "0 0.5 0.5 1 1"]
    assert label_lines(DETECTIONS, (60, 80), with_confidence=True).splitlines()[0].endswith(" 0.9")
    assert label_lines(torch.zeros(0, 6), (60, 80), with_confidence=True) == ""


def test_a_picture_leaves_all_files_that_are_wanted(tmp_path: Path) -> None:
    choice = OutputChoice(labels=True, confidences=True, crops=True, table=True)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "pic.png").write_bytes(b"")
    frame = Frame(IMAGE, str(tmp_path / "in" / "pic.png"))
    with Outputs(tmp_path, ["cat", "a/../b"], choice) as outputs:
        write(outputs, frame, DETECTIONS, IMAGE)
    assert np.array_equal(cv2.imread(str(tmp_path / "pic.png")), IMAGE)
    assert len((tmp_path / "labels" / "pic.txt").read_text().splitlines()) == 2
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["Image Name"], r["Prediction"], r["Confidence"]) for r in rows] == [
        ("pic.png", "a/../b", "0.9000"),
        ("pic.png", "cat", "0.2500"),
    ]
    crops = sorted(path.relative_to(tmp_path / "crops") for path in (tmp_path / "crops").rglob("*.jpg"))
    assert crops == [Path("a_.._b/pic.jpg"), Path("cat/pic.jpg")]
    # From 20 - 15.2 to 20 + 15.2: half of 20 px and 2 % more, and 5 px on each side; started pixels count.
    assert cv2.imread(str(tmp_path / "crops" / "a_.._b" / "pic.jpg")).shape == (32, 32, 3)
    assert cv2.imread(str(tmp_path / "crops" / "cat" / "pic.jpg")).shape == IMAGE.shape


def _written(folder: Path, names: list[str]) -> list[str]:
    """The files that detection in files of these names leaves."""
    files = [str(folder / name) for name in names]
    for file in files:
        Path(file).write_bytes(b"")
    (folder / "out").mkdir()
    with Outputs(folder / "out", ["a", "b"], OutputChoice(), files) as outputs:
        for file in files:
            write(outputs, Frame(IMAGE, file), DETECTIONS, IMAGE)
    made = sorted(path.name for path in (folder / "out").iterdir())
    assert all(cv2.imread(str(folder / "out" / name)).shape == IMAGE.shape for name in made)
    return made


def test_pictures_keep_their_names_in_every_format_that_can_be_written(tmp_path: Path) -> None:
    names = ["A.JPG", "b.Jpeg", "c.PNG", "d.bmp", "e.ppm", "f.TIFF", "g.webp", "h.dib", "i.jpe"]
    names += ["j.jp2"] if cv2.haveImageWriter("j.jp2") else []
    assert _written(tmp_path, names) == names


def test_pictures_in_formats_without_colours_or_without_a_writer_become_jpegs(tmp_path: Path) -> None:
    assert _written(tmp_path, ["a.pbm", "b.PGM", "c.mpo"]) == ["a.jpg", "b.jpg", "c.jpg"]


def test_names_that_differ_in_case_alone_lead_to_two_files_on_every_system(tmp_path: Path) -> None:
    (tmp_path / "case").write_bytes(b"")
    if (tmp_path / "CASE").exists():
        pytest.skip("the system takes both for one file")
    made = _written(tmp_path, ["UP.JPG", "a.JPG", "a.pgm", "a.ppm", "up.jpg"])
    assert made == ["UP.JPG", "a.JPG", "a.ppm", "a_2.jpg", "up_2.jpg"]


@pytest.mark.fault(
    "`detect.py --exist-ok` into the folder that its sources lie in",
    "refused; links and pipes in place of a result are replaced, not followed",
)
def test_sources_and_what_links_lead_to_stay_as_they_are(tmp_path: Path) -> None:
    source, out = tmp_path / "set/images/a.png", tmp_path / "out"
    source.parent.mkdir(parents=True)
    source.write_bytes(b"a photo")
    for folder in (tmp_path / "set", source.parent, tmp_path):
        with pytest.raises(UserError, match="lie in the folder for the results"):
            Outputs(folder, ["cat"], OutputChoice(labels=True), [str(source)])
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (out / "labels").mkdir(parents=True)
    for link in (out / "a.png", out / "labels/a.txt", out / "b.mp4"):
        link.symlink_to(precious)
    os.mkfifo(out / "c.png")
    others = [source.with_name(name) for name in ("b.mp4", "c.png")]
    for other in others:
        other.write_bytes(b"")
    files = [str(source), *map(str, others)]
    with Outputs(out, ["cat", "dog"], OutputChoice(labels=True), files) as outputs:
        write(outputs, Frame(IMAGE, files[0]), DETECTIONS, IMAGE)
        write(outputs, Frame(IMAGE, files[1], number=0), DETECTIONS, IMAGE)
        write(outputs, Frame(IMAGE, files[2]), DETECTIONS, IMAGE)
    assert precious.read_text() == "mine" and source.read_bytes() == b"a photo"
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == ["a.png", "b.mp4", "c.png"]
    assert not any(path.is_symlink() for path in out.rglob("*"))


def test_pictures_of_the_same_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    frames = []
    for number, folder in enumerate(("one", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "pic.png").write_bytes(b"")
        frames.append(Frame(np.full_like(IMAGE, number), str(tmp_path / folder / "pic.png")))
    with Outputs(tmp_path / "out", ["a", "b"], OutputChoice(labels=True)) as outputs:
        for frame in frames:
            write(outputs, frame, DETECTIONS, frame.image)
    assert cv2.imread(str(tmp_path / "out" / "pic.png")).max() == 0
    assert cv2.imread(str(tmp_path / "out" / "pic_2.png")).min() == 1
    assert sorted(p.name for p in (tmp_path / "out" / "labels").iterdir()) == ["pic.txt", "pic_2.txt"]


@pytest.mark.parametrize("labels", [False, True])
def test_an_image_its_label_file_and_its_rows_have_one_name(labels: bool, tmp_path: Path) -> None:
    sources = ["c.jpg", "c.png", "s/c.jpg", "s/c_2.jpg", "s/t/c_2.jpg", "v_1.jpg", "d.pbm", "d.jpg"]
    out, frames = tmp_path / "out", []
    out.mkdir()
    for number, name in enumerate(sources):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
        frames.append(Frame(np.full_like(IMAGE, 20 * number), str(tmp_path / name)))
    choice = OutputChoice(labels=labels, table=True)
    with Outputs(out, ["a", "b"], choice, [frame.source for frame in frames]) as outputs:
        for number, frame in enumerate(frames):
            # So many detections that an output file tells by itself what it is of.
            write(outputs, frame, DETECTIONS[:1].repeat(number + 1, 1), frame.image)
    drawn = [path for path in out.iterdir() if path.is_file() and path.suffix != ".csv"]
    of_image = {path.stem: round(float(cv2.imread(str(path)).mean()) / 20) for path in drawn}
    rows = [line.split(",")[0] for line in (out / "predictions.csv").read_text().splitlines()[1:]]
    counts = Counter(rows)
    assert list(counts.values()) == [1, 2, 3, 4, 5, 6, 7, 8]
    if labels:
        files = {path.stem: len(path.read_text().splitlines()) - 1 for path in (out / "labels").iterdir()}
        assert files == of_image and len(files) == len(sources)
        assert {Path(row).stem: count - 1 for row, count in counts.items()} == files
    else:
        assert {"c.jpg", "c.png", "c_2.jpg", "v_1.jpg"} <= set(rows)
        assert len(drawn) == len(sources)


@pytest.mark.parametrize(
    ("source", "stem"),
    [("rtsp://cam/stream.sdp", "rtsp___cam_stream.sdp"), ("rtsp://cam/", "rtsp___cam_"), ("0", "0")],
)
def test_rows_of_a_stream_have_the_name_of_its_label_files(source: str, stem: str, tmp_path: Path) -> None:
    choice = OutputChoice(images=False, labels=True, table=True)
    with Outputs(tmp_path, ["a", "b"], choice) as outputs:
        outputs.record(Frame(IMAGE, source, number=4, live=True), DETECTIONS[:1])
    assert [path.name for path in (tmp_path / "labels").iterdir()] == [f"{stem}_5.txt"]
    assert f"\n{stem},b,0.9000,5," in (tmp_path / "predictions.csv").read_text()


def test_nothing_found_leaves_no_label_file(tmp_path: Path) -> None:
    with Outputs(tmp_path, ["a", "b"], OutputChoice(images=False, labels=True)) as outputs:
        write(outputs, Frame(IMAGE, "x.jpg"), torch.zeros(0, 6), None)
    assert list((tmp_path / "labels").iterdir()) == []


def test_an_earlier_runs_labels_of_a_picture_go_when_nothing_is_found_any_more(tmp_path: Path) -> None:
    """With --exist-ok two runs share a folder; what the second did not look at stays."""
    for found in (DETECTIONS, DETECTIONS[:0]):
        with Outputs(tmp_path, ["a", "b"], OutputChoice(images=False, labels=True)) as outputs:
            write(outputs, Frame(IMAGE, "x.jpg"), found, None)
            if len(found):
                write(outputs, Frame(IMAGE, "y.jpg"), found, None)
        assert outputs.labels is not None and outputs.labels.count == 2 * bool(len(found))
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["y.jpg.txt"]


def _read_video(path: Path) -> tuple[list[np.ndarray], float]:
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


def test_a_video_keeps_size_and_duration(tmp_path: Path) -> None:
    choice = OutputChoice(labels=True, vid_stride=2)
    with Outputs(tmp_path, ["a", "b"], choice) as outputs:
        for number in range(0, 10, 2):
            write(outputs, Frame(IMAGE, "rtsp://cam/../x", number, fps=20.0, live=True), DETECTIONS, IMAGE)
    (video,) = tmp_path.glob("*.mp4")
    frames, fps = _read_video(video)
    assert len(frames) == 5 and frames[0].shape == IMAGE.shape and fps == 10
    stem = video.stem
    assert sorted(p.name for p in (tmp_path / "labels").iterdir()) == sorted(
        f"{stem}_{n}.txt" for n in (1, 3, 5, 7, 9)
    )


def test_streams_in_turn_go_into_a_video_each(tmp_path: Path) -> None:
    with Outputs(tmp_path, ["a", "b"], OutputChoice()) as outputs:
        for number in range(4):
            for source in ("0", "1"):
                write(outputs, Frame(IMAGE, source, number, live=True), DETECTIONS, IMAGE)
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["0.mp4", "1.mp4"]
    assert len(_read_video(tmp_path / "0.mp4")[0]) == len(_read_video(tmp_path / "1.mp4")[0]) == 4


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        write_image(tmp_path / "missing" / "a.jpg", IMAGE)


@pytest.mark.fault("disk full while a video is written", "error naming the incomplete video")
def test_a_video_that_finds_no_room_is_an_error(tmp_path: Path) -> None:
    """Without the check OpenCV says nothing and a file that no player opens is left."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    outputs = Outputs(tmp_path, ["a", "b"], OutputChoice())
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        for number in range(20):
            write(outputs, Frame(IMAGE, "clip.mp4", number), DETECTIONS, np.roll(IMAGE, number, 0))
        with pytest.raises(UserError, match=r"clip\.mp4\.mp4: the video of 20 frames is not whole; check"):
            outputs.__exit__(None, None, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_video_that_states_too_few_frames_is_an_error(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "v.mp4", 10)
    for _ in range(5):
        writer.write(IMAGE)
    writer.count = 50
    with pytest.raises(UserError, match=r"v\.mp4: the video of 50 frames is not whole"):
        writer.close()
    writer.close()  # said once


def test_a_broken_video_keeps_no_other_file_from_being_ended(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path, ["a", "b"], OutputChoice(table=True))
    for source in ("0", "1"):
        write(outputs, Frame(IMAGE, source, 0, live=True), DETECTIONS, IMAGE)
    (tmp_path / "0.mp4").unlink()
    with pytest.raises(UserError, match=r"0\.mp4"):
        outputs.__exit__(None, None, None)
    assert len(_read_video(tmp_path / "1.mp4")[0]) == 1
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 5


def test_the_error_that_ended_a_run_is_not_hidden_by_a_broken_video(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="first"), Outputs(tmp_path, ["a", "b"], OutputChoice()) as outputs:
        write(outputs, Frame(IMAGE, "0", 0, live=True), DETECTIONS, IMAGE)
        (tmp_path / "0.mp4").unlink()
        raise KeyError("first")


@pytest.mark.fault("disk full while predictions.csv is written", "error; an earlier table stays as it was")
def test_a_table_that_finds_no_room_leaves_the_earlier_one(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    (tmp_path / "predictions.csv").write_text("earlier")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        with (
            pytest.raises(UserError, match=r"predictions\.csv: cannot be written"),
            Outputs(tmp_path, ["a", "b"], OutputChoice(images=False, table=True)) as outputs,
        ):
            for number in range(100):
                write(outputs, Frame(IMAGE, f"{number}.jpg"), DETECTIONS, IMAGE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]
    assert (tmp_path / "predictions.csv").read_text() == "earlier"


def test_a_run_that_is_interrupted_keeps_the_rows_so_far(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        Outputs(tmp_path, ["a", "b"], OutputChoice(images=False, table=True)) as outputs,
    ):
        write(outputs, Frame(IMAGE, "x.jpg"), DETECTIONS, IMAGE)
        raise KeyboardInterrupt
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("box", [(50, 40, 10, 5), (-90, -90, -80, -80), (900, 900, 950, 950), (3, 3, 3, 3)])
def test_a_crop_is_never_empty(box: tuple[int, ...]) -> None:
    assert min(crop_of(IMAGE, box).shape) > 0
