"""docs/python.md says what is so: its blocks run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_blocks_of_the_python_page_run_one_after_the_other(tmp_path: Path) -> None:
    """In a folder that has what the project's has, so that what they write stays outside of it."""
    for name in ("data", "weights", "hubconf.py", "models", "utils"):
        (tmp_path / name).symlink_to(ROOT / name)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 7
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests/strict_warnings")}
    environment |= {"TORCH_HOME": str(tmp_path / "hub"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "image 1/1" in done.stdout and "nowhere.jpg" in done.stdout
    written = sorted(path.name for path in (tmp_path / "runs/detect/exp").iterdir())
    assert written == ["generated0.jpg", "generated1.jpg"]
