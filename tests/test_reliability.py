"""docs/reliability.md says what the tests say."""

from __future__ import annotations

import subprocess
import sys

from tests.reliability import PAGE, ROOT

PRINT = "from tests.reliability import collected, lines; print('\\n'.join(lines(collected())))"


def test_the_page_of_faults_is_current() -> None:
    # In a process of its own: a session of pytest within another would share its settings.
    done = subprocess.run(
        [sys.executable, "-c", PRINT], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == PAGE.read_text(encoding="utf-8"), "run `make reliability`"


def test_the_page_has_the_faults_that_are_promised() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for word in (
        "CMYK",
        "16-bit",
        "EXIF",
        "vanishes",
        "os.system",
        "billion",
        "SIGKILL",
        "UTF-16",
        "--check-data",
    ):
        assert word in text, word
