"""The detections in images, for Python programs: as tensors, dicts, tables, drawn images and files.

Shapes: n detections in an image, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.boxes import xyxy_to_cxcywh
from utils.config.files import next_run_folder
from utils.datasets.images import Image
from utils.errors import UserError
from utils.inference.drawing import DrawStyle, draw_detections
from utils.inference.writers import CropWriter, NameBook, crop_of, image_suffix, safe_name, write_image
from utils.words import counted, found_in_words

RUNS = "runs/detect"
_COLUMNS = ("xmin", "ymin", "xmax", "ymax"), ("xcenter", "ycenter", "width", "height")


class Detections:
    """The detections in a list of images, which can be indexed, sliced and iterated by image.

    `results[0]` has the detections in the first image, `results[1:3]` those in the next two; both are
    `Detections` as well.

    Attributes:
        ims, imgs: the images, (H, W, 3) uint8 RGB.
        files: a path, address or made-up name for each image.
        names: class names by index.
        n: the number of images.
        xyxy: a tensor (n, 6) per image, on the CPU, most confident first: left, top, right, bottom in
            pixels, confidence, class.
        xywh: the same with centre x, centre y, width, height.
        xyxyn, xywhn: the same, normalised by the image's width and height.
        pred: the same as `xyxy`.
        t, times: milliseconds per image for pre-processing, inference and NMS.
        s: (images of the call, 3, height, width) as the network got them; the largest sides if they differ.
    """

    def __init__(
        self,
        ims: Sequence[Image],
        pred: Sequence[Tensor],
        files: Sequence[str],
        names: Sequence[str],
        t: tuple[float, float, float] = (0.0, 0.0, 0.0),
        s: tuple[int, ...] = (),
    ) -> None:
        self.ims, self.pred, self.files = list(ims), list(pred), list(files)
        self.t, self.times, self.s = t, t, s
        self.names = dict(enumerate(names))
        self.n = len(self.ims)
        self.xyxy = self.pred
        self.xywh = [_with_boxes(found, xyxy_to_cxcywh(found[:, :4])) for found in self.pred]
        self.xyxyn = [_relative(*pair) for pair in zip(self.xyxy, self.ims, strict=True)]
        self.xywhn = [_relative(*pair) for pair in zip(self.xywh, self.ims, strict=True)]

    @property
    def imgs(self) -> list[Image]:
        """The images, under the name of older versions of YOLOv5."""
        return self.ims

    def __len__(self) -> int:
        """The number of images."""
        return self.n

    def __getitem__(self, index: int | slice) -> Detections:
        """The detections in one image, or in the images of a slice."""
        chosen = [*range(self.n)[index]] if isinstance(index, slice) else [range(self.n)[index]]
        return Detections(
            [self.ims[one] for one in chosen],
            [self.pred[one] for one in chosen],
            [self.files[one] for one in chosen],
            list(self.names.values()),
            self.t,
            self.s,
        )

    def __iter__(self) -> Iterator[Detections]:
        """Yield the detections in each image."""
        return (self[index] for index in range(self.n))

    def tolist(self) -> list[Detections]:
        """Return a list with the detections in each image."""
        return list(self)

    def __str__(self) -> str:
        """Return a line per image, and the times."""
        lines = []
        for number, (image, found) in enumerate(zip(self.ims, self.pred, strict=True), start=1):
            listed = found_in_words([int(label) for label in found[:, 5].tolist()], self.names)
            lines.append(
                f"image {number}/{self.n}: {image.shape[0]}x{image.shape[1]} {listed or '(nothing)'}"
            )
        before, network, after = self.t
        lines.append(f"{before:.1f} ms pre-process, {network:.1f} ms inference, {after:.1f} ms NMS per image")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Detections of {counted(self.n, 'image')}>\n{self}"

    def print(self) -> None:
        """Print a line per image, and the times."""
        print(self)

    def to_dict(self) -> list[dict[str, Any]]:
        """Return a dict per image of plain values, ready for JSON: file, width, height, detections.

        Each detection is a dict of class, name, confidence, and box with x1, y1, x2, y2 in pixels.
        """
        return [self._plain(index) for index in range(self.n)]

    def _plain(self, index: int) -> dict[str, Any]:
        height, width = self.ims[index].shape[:2]
        found = [
            {
                "class": int(label),
                "name": self.names[int(label)],
                "confidence": confidence,
                "box": dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)),
            }
            for *box, confidence, label in self.pred[index].tolist()
        ]
        return {"file": self.files[index], "width": width, "height": height, "detections": found}

    def plot(self, labels: bool = True, line_thickness: int | None = None) -> list[Image]:
        """Return copies of the images, (H, W, 3) RGB, with the boxes drawn, the most confident on top.

        labels: draw class names and confidences too. line_thickness: in pixels; by default it depends on the
        image size.
        """
        return [self._drawn(index, labels, line_thickness)[..., ::-1].copy() for index in range(self.n)]

    def render(self, labels: bool = True) -> list[Image]:
        """Return the images as drawn by `plot`, and replace `ims` by them."""
        self.ims = self.plot(labels)
        return self.ims

    def show(self, labels: bool = True) -> None:
        """Open the drawn images in the system's viewer. Raises UserError if Pillow is not installed."""
        try:
            from PIL import Image as PILImage
        except ImportError as error:
            raise UserError("needs Pillow", "show()", "pip install pillow, or save() the images") from error
        for image in self.plot(labels):
            PILImage.fromarray(image).show()

    def save(self, labels: bool = True, save_dir: Path | str = f"{RUNS}/exp", exist_ok: bool = False) -> Path:
        """Write the drawn images into a folder and return its path.

        Args:
            labels: draw class names and confidences too.
            save_dir: the folder; if it exists, a number is appended to its name.
            exist_ok: write into an existing folder, replacing files of the same names.

        Raises:
            UserError: if the folder cannot be written, or is one that cannot be numbered, such as ".",
                without `exist_ok`.
        """
        folder = _folder(save_dir, exist_ok)
        book = NameBook()
        for index, file in enumerate(self.files):
            name = book.name(index, safe_name(Path(file).stem), image_suffix(file))
            write_image(folder / name, self._drawn(index, labels, None))
        return folder

    def crop(
        self, save: bool = True, save_dir: Path | str = f"{RUNS}/exp", exist_ok: bool = False
    ) -> list[dict[str, Any]]:
        """Cut the detections out of the images.

        Args:
            save: also write them, with a small margin, as `save_dir/crops/CLASS/NAME.jpg`.
            save_dir: as in `save`.
            exist_ok: as in `save`.

        Returns:
            A dict per detection: box (4,) in pixels, conf, cls, label (name and confidence), and im, the
            crop (h, w, 3) RGB with the margin, which is never empty.

        Raises:
            UserError: if the crops cannot be written.
        """
        writer = (
            CropWriter(_folder(save_dir, exist_ok) / "crops", list(self.names.values())) if save else None
        )
        crops, book = [], NameBook()
        for index, (image, found) in enumerate(zip(self.ims, self.pred, strict=True)):
            if writer is not None:
                name = book.name(index, safe_name(Path(self.files[index]).stem))
                writer.write(name, np.ascontiguousarray(image[..., ::-1]), found)
            for row in found:
                crops.append(
                    {
                        "box": row[:4],
                        "conf": float(row[4]),
                        "cls": int(row[5]),
                        "label": f"{self.names[int(row[5])]} {float(row[4]):.2f}",
                        "im": crop_of(image, row[:4].tolist()),
                    }
                )
        return crops

    def display(
        self,
        pprint: bool = False,
        show: bool = False,
        save: bool = False,
        crop: bool = False,
        render: bool = False,
        labels: bool = True,
    ) -> None:
        """Call those of `print`, `show`, `save`, `crop` and `render` that are asked for.

        labels: draw class names and confidences too. Raises UserError as they do.
        """
        if pprint:
            self.print()
        if show:
            self.show(labels)
        if save:
            self.save(labels)
        if crop:
            self.crop()
        if render:
            self.render(labels)

    def pandas(self) -> SimpleNamespace:
        """Return pandas tables as `.xyxy`, `.xywh`, `.xyxyn` and `.xywhn`, each a list with one per image.

        Raises:
            UserError: if pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UserError("needs pandas", "pandas()", "pip install pandas, or use to_dict()") from error
        tables = {}
        for kind in ("xyxy", "xywh", "xyxyn", "xywhn"):
            columns = [*_COLUMNS["wh" in kind], "confidence", "class", "name"]
            tables[kind] = [
                pandas.DataFrame(
                    [[*row[:5], int(row[5]), self.names[int(row[5])]] for row in found.tolist()],
                    columns=columns,
                )
                for found in getattr(self, kind)
            ]
        return SimpleNamespace(**tables)

    def _drawn(self, index: int, labels: bool, line_thickness: int | None) -> Image:
        """Return a copy of an image, in BGR, with its boxes drawn."""
        image = np.ascontiguousarray(self.ims[index][..., ::-1])
        style = DrawStyle(line_thickness, hide_labels=not labels)
        return draw_detections(image, self.pred[index].numpy(), list(self.names.values()), style)


def _with_boxes(found: Tensor, boxes: Tensor) -> Tensor:
    return torch.cat((boxes, found[:, 4:]), 1)


def _relative(found: Tensor, image: Image) -> Tensor:
    height, width = image.shape[:2]
    return _with_boxes(found, found[:, :4] / found.new_tensor((width, height, width, height)))


def _folder(save_dir: Path | str, exist_ok: bool) -> Path:
    path = Path(save_dir)
    if path.name in ("", "..") and not exist_ok:  # exists, and files in it would be replaced
        fix = "name a folder to be made, as in save_dir='found', or say exist_ok=True"
        raise UserError("is there already, and files in it may be replaced", save_dir, fix)
    return next_run_folder(path.parent, path.name, exist_ok)
