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


def commands_of(name):
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", "")
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return {" ".join(line.split()) for kind, block in blocks if not kind for line in block.splitlines()}


def test_the_chinese_readme_has_no_command_that_the_english_one_lacks():
    chinese = commands_of("README.zh-CN.md")
    assert len(chinese) >= 8
    assert chinese <= commands_of("README.md")


def test_the_chinese_readme_has_the_figures_and_the_code_of_the_english_one():
    chinese, english = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.zh-CN.md", "README.md")
    )
    beginning = english.split("\n## ")[0]
    figures = re.findall(r"\b\d\d\.\d\b", beginning)
    assert len(figures) > 2 and all(figure in chinese.split("\n## ")[0] for figure in figures)
    for language in ("sh", "python"):
        blocks = [
            [[line.partition(" #")[0].rstrip() for line in block.splitlines()] for block in found]
            for found in (
                re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) for text in (chinese, english)
            )
        ]
        assert blocks[0] == blocks[1] and blocks[0]
