"""What a network found in images, as Python programs want it: numbers, images, files.

Shapes: n detections of an image, H W pixels.
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
from utils.inference.writers import CropWriter, NameBook, image_suffix, safe_name, write_image
from utils.reporting.draw import draw_boxes
from utils.words import counted, found_in_words

RUNS = "runs/detect"
_COLUMNS = ("xmin", "ymin", "xmax", "ymax"), ("xcenter", "ycenter", "width", "height")


class Detections:
    """The detections in a list of images; indexed and iterated by image.

    `results[0]` has the detections in the first image, `results[1:3]` those in two.

    ims: the images, (H, W, 3) uint8 RGB. files: a name for each. names: of the classes. xyxy, xywh: a
    tensor (n, 6) an image, on the CPU, best first: left, top, right, bottom (or centre, size) in pixels,
    confidence, class; xyxyn and xywhn: the same as parts of the image's width and height. pred: as xyxy.
    t: milliseconds an image for preparing, network and suppression.
    """

    def __init__(
        self,
        ims: Sequence[Image],
        pred: Sequence[Tensor],
        files: Sequence[str],
        names: Sequence[str],
        t: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> None:
        self.ims, self.pred, self.files, self.t = list(ims), list(pred), list(files), t
        self.names = dict(enumerate(names))
        self.n = len(self.ims)
        self.xyxy = self.pred
        self.xywh = [_with_boxes(found, xyxy_to_cxcywh(found[:, :4])) for found in self.pred]
        self.xyxyn = [_relative(*pair) for pair in zip(self.xyxy, self.ims, strict=True)]
        self.xywhn = [_relative(*pair) for pair in zip(self.xywh, self.ims, strict=True)]

    def __len__(self) -> int:
        """How many images."""
        return self.n

    def __getitem__(self, index: int | slice) -> Detections:
        """Those of one image, or of the images of a slice."""
        chosen = [*range(self.n)[index]] if isinstance(index, slice) else [range(self.n)[index]]
        return Detections(
            [self.ims[one] for one in chosen],
            [self.pred[one] for one in chosen],
            [self.files[one] for one in chosen],
            list(self.names.values()),
            self.t,
        )

    def __iter__(self) -> Iterator[Detections]:
        """Those of each image."""
        return (self[index] for index in range(self.n))

    def tolist(self) -> list[Detections]:
        """Those of each image."""
        return list(self)

    def __str__(self) -> str:
        """A line an image, and the times."""
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
        """Prints what was found."""
        print(self)

    def to_dict(self) -> list[dict[str, Any]]:
        """A dict an image, of plain values: file, width, height, detections; ready for JSON."""
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
        """Copies of the images (H, W, 3) RGB with the boxes drawn, the most confident on top.

        labels: with names and confidences. line_thickness: pixels; left out, by the size of the image.
        """
        return [self._drawn(index, labels, line_thickness)[..., ::-1].copy() for index in range(self.n)]

    def render(self, labels: bool = True) -> list[Image]:
        """As `plot`; from then on `ims` are these images."""
        self.ims = self.plot(labels)
        return self.ims

    def show(self, labels: bool = True) -> None:
        """Opens the drawn images in the system's viewer. Raises UserError without Pillow."""
        try:
            from PIL import Image as PictureFile
        except ImportError as error:
            raise UserError("needs Pillow", "show()", "pip install pillow, or save() the images") from error
        for image in self.plot(labels):
            PictureFile.fromarray(image).show()

    def save(self, labels: bool = True, save_dir: Path | str = f"{RUNS}/exp", exist_ok: bool = False) -> Path:
        """Writes the drawn images into a folder and gives it.

        save_dir: a number is added where it is taken, unless `exist_ok`.

        Raises:
            UserError: it cannot be written, or is no name of its own, as ".".
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
        """The detections cut out: dicts with box (4,), conf, cls, label, and im (h, w, 3) RGB, not empty.

        save: also write them as `save_dir/crops/CLASS/NAME.jpg`. Raises UserError where that fails.
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
                x1, y1, x2, y2 = row[:4].round().int().tolist()
                # A box at the right or lower border may round to beyond the last pixel.
                x1, y1 = min(x1, image.shape[1] - 1), min(y1, image.shape[0] - 1)
                crops.append(
                    {
                        "box": row[:4],
                        "conf": float(row[4]),
                        "cls": int(row[5]),
                        "label": f"{self.names[int(row[5])]} {float(row[4]):.2f}",
                        "im": image[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)],
                    }
                )
        return crops

    def pandas(self) -> SimpleNamespace:
        """The detections as pandas' tables: `.xyxy`, `.xywh`, `.xyxyn`, `.xywhn`, each a table an image.

        Raises:
            UserError: pandas is not installed.
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
        """The image (BGR) with its boxes."""
        flipped = self.pred[index].flip(0).numpy()
        return draw_boxes(
            np.ascontiguousarray(self.ims[index][..., ::-1]),
            flipped[:, :4],
            flipped[:, 5].astype(np.int64),
            list(self.names.values()),
            flipped[:, 4],
            line_thickness=line_thickness,
            hide_labels=not labels,
        )


def _with_boxes(found: Tensor, boxes: Tensor) -> Tensor:
    return torch.cat((boxes, found[:, 4:]), 1)


def _relative(found: Tensor, image: Image) -> Tensor:
    height, width = image.shape[:2]
    return _with_boxes(found, found[:, :4] / found.new_tensor((width, height, width, height)))


def _folder(save_dir: Path | str, exist_ok: bool) -> Path:
    path = Path(save_dir)
    if path.name in ("", "..") and not exist_ok:  # a folder that is there, with images of the same names
        fix = "name a folder to be made, as in save_dir='found', or say exist_ok=True"
        raise UserError("is there already, and files in it may be replaced", save_dir, fix)
    return next_run_folder(path.parent, path.name, exist_ok)
