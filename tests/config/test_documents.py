"""The pages in docs/ quote what the program says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py"), *(ROOT / "models").rglob("*.py")]


@pytest.fixture(scope="module")
def program():
    """All source text, with strings that go on in the next line joined."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    return re.sub(r'"\s*\n\s*f?"', "", text)


def quoted_messages():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split("## No message")[0]
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def test_every_message_that_is_explained_exists(program):
    messages = quoted_messages()
    assert len(messages) > 25
    for message in messages:
        for part in re.split(r"\s*\.\.\.,?\s*", message):
            assert part in program, f"docs/troubleshooting.md explains what is never said: {part!r}"
