"""Windows that show frames as they are processed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import cv2

from utils.datasets.images import Image

_QUIT_KEYS = (ord("q"), 27)


class Viewer:
    """Shows frames in windows; warns once and does nothing if that is not possible."""

    def __init__(self, wanted: bool, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self.enabled = wanted
        # Without a display some OpenCV builds terminate the whole process, so do not call them at all.
        if (
            wanted
            and sys.platform == "linux"
            and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
        ):
            self._give_up("there is no display")

    def show(self, title: str, image: Image) -> bool:
        """Show a frame; returns False if the user pressed q or Escape."""
        if not self.enabled:
            return True
        try:
            # A window title that is not valid UTF-8 would terminate the process.
            cv2.imshow(title.encode("utf-8", "backslashreplace").decode(), image)
            return (cv2.waitKey(1) & 0xFF) not in _QUIT_KEYS
        except cv2.error:
            self._give_up("this OpenCV is built without windows")
            return True

    def close(self) -> None:
        """Close all windows."""
        if self.enabled:
            cv2.destroyAllWindows()

    def _give_up(self, reason: str) -> None:
        self.enabled = False
        self._warn(f"--view-img is left out: {reason}")
