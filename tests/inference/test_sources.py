"""Every kind of source, with real files and a real stream on this machine."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.config.addresses import without_password
from utils.errors import UserError
from utils.inference import remote
from utils.inference.frames import file_name, is_live, is_remote_file
from utils.inference.sources import FileSource, open_source, resolve_default_source
from utils.inference.streams import StreamSource


def write_video(path: Path, frames: int = 12, fps: float = 10.0, size_wh: tuple[int, int] = (64, 48)) -> Path:
    """A video whose frame n is uniformly grey at 20 n."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, size_wh)
    for number in range(frames):
        writer.write(np.full((size_wh[1], size_wh[0], 3), 20 * number % 256, np.uint8))
    writer.release()
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, a broken one, a text file and a video."""
    for name, grey in (("b.jpg", 200), ("a.png", 100)):
        cv2.imwrite(str(tmp_path / name), np.full((20, 30, 3), grey, np.uint8))
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "notes.md").write_text("not for detection")
    write_video(tmp_path / "clip.mp4", frames=3)
    return tmp_path


def test_a_folder_gives_pictures_and_videos_in_order_and_skips_what_is_broken(folder: Path) -> None:
    said: list[str] = []
    source = open_source(str(folder), warn=said.append)
    frames = list(source)
    assert [(Path(f.source).name, f.number) for f in frames] == [
        ("a.png", None),
        ("b.jpg", None),
        ("clip.mp4", 0),
        ("clip.mp4", 1),
        ("clip.mp4", 2),
    ]
    assert len(source.skipped) == len(said) == 1 and "broken.jpg" in said[0]
    assert frames[0].image.shape == (20, 30, 3) and frames[0].image.mean() == 100
    assert frames[0].place == "1/4" and frames[3].place == "4/4 frame 2 of 3"


def test_a_pattern_and_a_list_give_what_they_name(folder: Path) -> None:
    assert [Path(f.source).name for f in open_source(str(folder / "*.[jp][pn]g"), warn=str)] == [
        "a.png",
        "b.jpg",
    ]
    (folder / "sub").mkdir()
    cv2.imwrite(str(folder / "sub" / "c.png"), np.zeros((5, 5, 3), np.uint8))
    assert [Path(f.source).name for f in open_source(str(folder / "**/*.png"))] == ["a.png", "c.png"]
    listing = folder / "list.txt"
    listing.write_text(f"# mine\n{folder / 'b.jpg'}\n\n{folder / 'a.png'}\n")
    assert [Path(f.source).name for f in open_source(str(listing))] == ["b.jpg", "a.png"]


def test_what_a_list_names_twice_is_read_once(folder: Path) -> None:
    listing = folder / "list.txt"
    listing.write_text("clip.mp4\nb.jpg\n*.mp4\nb.jpg\n")
    frames = [(Path(frame.source).name, frame.number) for frame in open_source(str(listing))]
    assert frames == [("clip.mp4", 0), ("clip.mp4", 1), ("clip.mp4", 2), ("b.jpg", None)]


def test_a_file_with_a_pattern_in_its_name_is_that_file(tmp_path: Path) -> None:
    path = tmp_path / "a[1].png"
    cv2.imwrite(str(path), np.zeros((5, 5, 3), np.uint8))
    assert [f.source for f in open_source(str(path))] == [str(path)]


def test_video_frames_come_in_steps(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", frames=10, fps=12.5)
    frames = list(open_source(str(video), vid_stride=4))
    assert [f.number for f in frames] == [0, 4, 8] and frames[0].fps == 12.5
    assert [round(f.image.mean() / 20) for f in frames] == [0, 4, 8]


def test_a_video_that_was_cut_off_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "v.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for _ in range(20):
        writer.write(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    writer.release()
    said: list[str] = []
    assert len(list(open_source(str(path), vid_stride=3, warn=said.append))) == 7 and said == []
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    source = open_source(str(path), warn=said.append)
    count = len(list(source))
    assert 0 < count < 20
    assert said == [f"{path}: ended after {count} of 20 frames, the file may be cut off"]
    assert source.skipped == []


def test_a_video_whose_name_is_no_text_is_skipped(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/v\xff.mp4")
    write_video(tmp_path / "v.mp4").rename(path)
    source = FileSource([path], warn=str)
    assert list(source) == [] and "not UTF-8" in source.skipped[0]


def test_hidden_files_are_no_part_of_a_folder_or_a_pattern(folder: Path) -> None:
    for name in (".b.jpg", "._a.png"):
        (folder / name).write_bytes((folder / "a.png").read_bytes())
    names = [Path(f.source).name for f in open_source(str(folder), warn=str)]
    assert names[:2] == ["a.png", "b.jpg"] and len(names) == 5
    assert [Path(f.source).name for f in open_source(str(folder / "*.jpg"), warn=str)] == ["b.jpg"]
    assert len(list(open_source(str(folder / ".b.jpg")))) == 1


def test_a_list_may_name_what_lies_beside_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "work").mkdir()
    monkeypatch.chdir(folder / "work")
    listing = folder / "list.txt"
    listing.write_text("b.jpg\na.*\n", encoding="utf-8-sig")
    assert [Path(f.source).name for f in open_source("../list.txt")] == ["b.jpg", "a.png"]
    cv2.imwrite("b.jpg", np.zeros((5, 5, 3), np.uint8))
    first = next(iter(open_source("../list.txt")))
    assert first.image.shape == (5, 5, 3)
    listing.write_text("gone.jpg\n")
    with pytest.raises(UserError, match=r"gone\.jpg: no such file or folder; it stands in \.\./list\.txt"):
        open_source("../list.txt")


def test_a_broken_video_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"\x00" * 100)
    said: list[str] = []
    source = FileSource([str(tmp_path / "v.mp4")], warn=said.append)
    assert list(source) == [] and "v.mp4" in said[0]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere.jpg", "no such file"),
        ("*.nothing", "no image or video matches"),
        ("empty", "no image or video in this folder"),
        ("notes.md", "neither an image nor a video"),
        ("missing.txt", "cannot be read"),
        ("empty.txt", "is empty"),
        ("x" * 300, "no such file"),
    ],
)
def test_a_source_without_anything_to_read_is_refused(tmp_path: Path, source: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("text")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match=words):
        open_source(str(tmp_path / source))


class _Quiet(http.server.SimpleHTTPRequestHandler):
    authorized: str | None = None
    agent = ""

    def do_GET(self) -> None:
        type(self).authorized, type(self).agent = self.headers["Authorization"], self.headers["User-Agent"]
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        if not self.path.startswith("/short"):
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(bytes(10))

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address at which the files of `tmp_path` are served."""
    handler = partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()


def test_pictures_and_videos_at_an_address_are_files(tmp_path: Path, server: str) -> None:
    (tmp_path / "sub").mkdir()
    cv2.imwrite(str(tmp_path / "sub" / "größe 1.png"), np.full((20, 30, 3), 100, np.uint8))
    (picture,) = open_source(f"{server}/sub/größe 1.png?size=large")
    assert picture.image.shape == (20, 30, 3) and picture.number is None and not picture.live
    assert _Quiet.agent.startswith("yolov5-distillation/")
    write_video(tmp_path / "v.mp4", frames=40)
    frames = list(open_source(f"{server}/v.mp4", vid_stride=2))
    assert [frame.number for frame in frames] == list(range(0, 40, 2))
    assert all(not frame.live and frame.fps == 10 for frame in frames)
    listing = tmp_path / "list.txt"
    listing.write_text(f"{server}/v.mp4\n{server}/sub/gr%C3%B6%C3%9Fe%201.png\n")
    assert [file_name(frame.source) for frame in open_source(str(listing))][39:] == ["v.mp4", "größe 1.png"]


def test_a_video_that_has_to_be_read_from_its_end_is_fetched_first(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server sends no parts of files: a long one's index, behind its frames, is out of reach."""
    write_video(tmp_path / "v.mp4", frames=5)
    opened: list[str] = []

    def capture(address: str) -> cv2.VideoCapture:
        opened.append(address)
        return real() if address.startswith("http") else real(address)

    real = cv2.VideoCapture
    monkeypatch.setattr("utils.inference.sources.cv2.VideoCapture", capture)
    frames = list(open_source(f"{server}/v.mp4"))
    assert [frame.number for frame in frames] == [0, 1, 2, 3, 4]
    assert {frame.source for frame in frames} == {f"{server}/v.mp4"}
    assert len(opened) == 2 and not Path(opened[1]).parent.exists()
    monkeypatch.setattr(remote, "MAX_VIDEO_BYTES", 100)
    source = FileSource([f"{server}/v.mp4"], warn=str)
    assert list(source) == [] and "has more than" in source.skipped[0]


def test_the_pictures_that_ship_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(list(open_source(resolve_default_source("data/images")))) >= 2
    (tmp_path / "data/images").mkdir(parents=True)
    assert [resolve_default_source(given) for given in ("data/images", "b")] == ["data/images", "b"]


def test_pictures_that_cannot_be_fetched_are_skipped_with_the_reason(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "large.jpg").write_bytes(bytes(3 * 2**20))
    monkeypatch.setattr(remote, "MAX_BYTES", 2**20)
    addresses = [f"{server}/{name}.jpg" for name in ("gone", "text", "large", "short")]
    dead = "http://me:secret@127.0.0.1:9/a.jpg"  # nobody listens there
    source = FileSource([*addresses, dead, f"{server}/gone.mp4"], warn=str)
    assert list(source) == []
    for told, words in zip(
        source.skipped, ("404", "decode", "more than 1 MiB", "90 bytes", "refused", "404"), strict=True
    ):
        assert words in told and "secret" not in told


def test_pictures_are_followed_to_web_servers_alone(tmp_path: Path, server: str) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((5, 5, 3), np.uint8))
    (frame,) = open_source(f"{server}/to/{server}/a.png")
    assert frame.image.shape == (5, 5, 3)
    source = FileSource(
        [f"{server}/to/ftp://127.0.0.1/a.png", f"{server}/to/file://{tmp_path}/a.png"], warn=str
    )
    assert list(source) == []
    assert "from http to ftp, which is not followed" in source.skipped[0] and "302" in source.skipped[1]


def test_an_address_may_have_a_user_and_a_password(tmp_path: Path, server: str) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((5, 5, 3), np.uint8))
    (frame,) = open_source(server.replace("http://", "http://me:se%40cret@") + "/a.png")
    assert frame.source == f"{server}/a.png"
    assert _Quiet.authorized == "Basic bWU6c2VAY3JldA=="


@pytest.mark.parametrize("address", ["http://[bad", "http://me:secret@[bad/a.jpg", "rtsp://x:port/live"])
def test_what_only_looks_like_an_address_is_refused(address: str, tmp_path: Path) -> None:
    listing = tmp_path / "list.txt"
    listing.write_text(f"{address}\n")
    for source in (address, str(listing)):
        with pytest.raises(UserError, match="is not an address") as error:
            open_source(source)
        assert "secret" not in str(error.value)


def test_a_network_stream_gives_its_newest_frames_until_it_ends(tmp_path: Path, server: str) -> None:
    write_video(tmp_path / "v.mp4").rename(tmp_path / "live")
    frames = list(open_source(f"{server}/live"))
    numbers = [frame.number for frame in frames]
    assert numbers == sorted(set(numbers)) and numbers[-1] == 11
    assert all(frame.live and frame.fps == 10 for frame in frames)
    assert all(abs(frame.image.mean() - 20 * (frame.number or 0)) < 5 for frame in frames)


def test_several_streams_come_in_turn_and_a_dead_one_is_told(tmp_path: Path, server: str) -> None:
    for name in ("one", "two"):
        write_video(tmp_path / f"{name}.mp4").rename(tmp_path / name)
    listing = tmp_path / "all.streams"
    listing.write_text(f"{server}/one\n{server}/gone\n{server}/two\n")
    said: list[str] = []
    source = open_source(str(listing), warn=said.append)
    ends = {Path(frame.source).name: frame.number for frame in source}
    assert ends == {"one": 11, "two": 11}
    assert len(said) == len(source.skipped) == 1 and "gone" in said[0]


def test_no_stream_at_all_is_an_error_without_the_password(server: str) -> None:
    address = server.replace("http://", "http://me:secret@") + "/gone.mp4"
    with pytest.raises(UserError, match="cannot be opened") as error:
        list(StreamSource([address]))
    assert "secret" not in str(error.value) and "gone.mp4" in str(error.value)


@pytest.mark.parametrize("number", ["99999999999", "9" * 5000])
def test_a_camera_of_a_number_that_none_can_have_is_an_error(number: str) -> None:
    with pytest.raises(UserError, match=f"^{number}: cannot be opened; check the address, the camera"):
        list(open_source(number))


def test_a_reader_that_is_left_early_stops(tmp_path: Path, server: str) -> None:
    write_video(tmp_path / "v.mp4", frames=200).rename(tmp_path / "live")
    frames = iter(open_source(f"{server}/live"))
    next(frames)
    frames.close()  # type: ignore[attr-defined]
    assert not any(thread.name.endswith("live") for thread in threading.enumerate())


def test_live_sources_are_told_from_files() -> None:
    assert is_live("0") and is_live("rtsp://x/y") and is_live("HTTPS://x/y")
    assert is_live("rtsp://x/y.mp4") and is_live("http://x/y.mp4/live") and is_live("http://x/?a.jpg")
    assert not is_live("HTTPS://x/y.MP4") and is_remote_file("HTTPS://x/y.MP4")
    assert is_remote_file("http://me:pass@x/a%20b.jpg?size=3") and not is_remote_file("x/a.jpg")
    assert file_name("http://me:pass@x/c/a%20b.jpg?size=3#here") == "a b.jpg"
    assert not is_live("video.mp4") and not is_live("0.jpg") and not is_live("²")
    assert without_password("rtsp://me:pass@cam:554/a?b=c") == "rtsp://cam:554/a?b=c"
    assert without_password("C:/me:x@y.jpg") == "C:/me:x@y.jpg"


@pytest.mark.parametrize(
    "address", ["https://www.youtube.com/watch?v=x", "https://youtu.be/x", "http://YouTube.com/x"]
)
def test_a_page_with_a_video_is_told_before_it_is_asked(address: str) -> None:
    with pytest.raises(UserError, match="is the address of a page"):
        open_source(address)


def test_the_screen_is_told_to_be_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("screen", "screen 0 100 100 512 256"):
        with pytest.raises(UserError, match=f"--source {source}: the screen is no source here"):
            open_source(source)
    (tmp_path / "screen").mkdir()
    with pytest.raises(UserError, match="no image or video in this folder"):
        open_source("screen")


def test_a_device_is_no_file_but_is_there():
    with pytest.raises(UserError, match=r"^/dev/null: neither a file nor a folder; a camera is named by"):
        open_source("/dev/null")


def test_a_link_to_a_parent_folder_repeats_no_image(folder: Path) -> None:
    (folder / "deep").mkdir()
    os.symlink(folder, folder / "deep/up")
    os.symlink("b.jpg", folder / "same.jpg")  # another name is another image
    found = [Path(frame.source) for frame in open_source(str(folder / "**/*.jpg"), warn=str)]
    assert sorted(path.name for path in found) == ["b.jpg", "same.jpg"]
    assert all(path.parent == folder for path in found)
