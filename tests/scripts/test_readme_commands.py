"""Every command of the README runs: in the order in which it stands there, on a few small images."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from models.checkpoint import save_checkpoint
from models.yolo import Model

ROOT = Path(__file__).resolve().parents[2]
CPU = ["--device", "cpu"]
SHORT = ["--img", "64", "--epochs", "1", "--batch-size", "4", "--workers", "0", "--noplots", *CPU]
# What makes a command short; a script that is missing here is a command that no test runs.
SHORTER = {
    "train.py": SHORT,
    "train_distill.py": SHORT,
    "test.py": ["--img", "64", "--batch-size", "4", "--workers", "0", "--noplots", *CPU],
    "detect.py": ["--img", "64", *CPU],
    "compare.py": ["--img", "64", "--workers", "0", *CPU],
    "export.py": ["--img", "64", *CPU],
}
RESUMED = CPU
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def commands():
    """The lines of the plain code blocks, and what stands in the text as a whole `python ...` command."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    lines = [line for kind, block in blocks if not kind for line in block.splitlines()]
    lines += re.findall(r"`(python [\w.]+ [^`]+)`", text)
    found = [" ".join(line.partition(" # ")[0].split()) for line in lines]
    return list(dict.fromkeys(command for command in found if command and "..." not in command))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, make_shapes):
    """A folder with what the README speaks of: parts.yaml, weights and images."""
    folder = tmp_path_factory.mktemp("readme")
    shapes = yaml.safe_load(make_shapes(folder / "parts").read_text(encoding="utf-8"))
    (folder / "parts.yaml").write_text(yaml.safe_dump({**shapes, "test": "images/val"}), encoding="utf-8")
    config = yaml.safe_load((ROOT / "models/yolov5n.yaml").read_text(encoding="utf-8"))
    model = Model({**config, "width_multiple": 0.125}, nc=2)
    model.names = list(shapes["names"])
    for name in ("yolov5n", "yolov5s", "teacher", "best"):
        save_checkpoint(folder / f"{name}.pt", model=model, epoch=0, best_fitness=0.0, meta={})
    (folder / "pictures").symlink_to(folder / "parts/images/val")
    return folder


def run(command, folder, run_script):
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", MAKEFILE, re.MULTILINE), f"no such target: {command}"
        return
    ranks = 2 if words[0] == "torchrun" else 0
    if ranks:
        words = words[2:]  # --nproc_per_node 4
    script, arguments = words[1], words[2:]
    assert script in SHORTER, f"tests do not know how to run: {command}"
    arguments += RESUMED if "--resume" in arguments else SHORTER[script]
    done = run_script(script, *arguments, cwd=folder, ranks=ranks)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
def test_every_command_of_the_readme_runs(workspace, run_script):
    listed = commands()
    assert len(listed) >= 10
    for command in listed:
        run(command, workspace, run_script)
