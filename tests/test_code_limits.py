"""What holds for all code: sizes, style, types, and the direction of imports."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("train.py", "train_distill.py", "test.py", "detect.py", "compare.py", "export.py")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_SCRIPT_LINES = 40
CATCH_ALL_NAMES = {"general", "misc", "helpers", "common_utils", "utils"}


def _sources() -> list[Path]:
    folders = ("models", "utils", "experiments", "benchmarks")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [*files, ROOT / "hubconf.py", *(ROOT / name for name in SCRIPTS)]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_files_and_functions_are_short() -> None:
    too_long = []
    for path in _sources():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > (MAX_SCRIPT_LINES if path.name in SCRIPTS else MAX_FILE_LINES):
            too_long.append(f"{_name(path)}: {lines} lines")
        for function in _functions(path):
            length = (function.end_lineno or 0) - function.lineno + 1
            if length > MAX_FUNCTION_LINES:
                too_long.append(f"{_name(path)}:{function.lineno} {function.name}: {length} lines")
    assert not too_long


def test_package_files_are_empty_and_no_file_has_a_catch_all_name() -> None:
    assert [_name(p) for p in _sources() if p.name == "__init__.py" and p.stat().st_size] == []
    assert [_name(p) for p in _sources() if p.stem in CATCH_ALL_NAMES] == []


def test_only_one_file_imports_pickle_and_nothing_evaluates_text() -> None:
    picklers, evaluators = set(), set()
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if {"pickle", "marshal", "shelve", "dill"} & {module.split(".")[0] for module in modules}:
                picklers.add(_name(path))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in {"eval", "exec"}:
                    evaluators.add(_name(path))
    assert picklers <= {"models/foreign.py"}
    assert evaluators == set()


def _run(*command: str, cwd: Path = ROOT) -> str:
    """Runs a tool of this environment; fails with its output."""
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ruff_looks_at_every_file() -> None:
    pytest.importorskip("ruff", reason="ruff is missing: make dev")
    command = [sys.executable, "-m", "ruff", "check", "--show-files", "."]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = {*_sources(), *(ROOT / "tests").rglob("*.py")}
    assert files <= {Path(line) for line in shown.splitlines()}


def test_ruff_finds_nothing() -> None:
    pytest.importorskip("ruff", reason="ruff is missing: make dev")
    _run("-m", "ruff", "check", "--no-cache", ".")


def test_code_is_formatted() -> None:
    pytest.importorskip("ruff", reason="ruff is missing: make dev")
    _run("-m", "ruff", "format", "--no-cache", "--check", ".")


@pytest.mark.slow
def test_mypy_finds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is missing: make dev")
    _run("-m", "mypy", "--no-error-summary")


def test_imports_point_one_way() -> None:
    pytest.importorskip("importlinter", reason="import-linter is missing: make dev")
    _run("-c", "import sys; from importlinter.cli import lint_imports_command as c; c(['--no-cache'])")


def test_the_linter_of_imports_sees_a_forbidden_import(tmp_path: Path) -> None:
    pytest.importorskip("importlinter", reason="import-linter is missing: make dev")
    _copy_project(tmp_path)
    offender = tmp_path / "models/decode.py"
    offender.write_text(offender.read_text() + "\nimport utils.training.ema  # noqa\n")
    command = "from importlinter.cli import lint_imports_command as c; c(['--no-cache'])"
    done = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"models.decode -> utils.training.ema" in done.stdout


def _copy_project(target: Path) -> None:
    """Copies code and settings, without data, weights or runs."""
    for folder in ("models", "utils", "data"):
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*SCRIPTS, "pyproject.toml"):
        shutil.copy(ROOT / name, target / name)


def test_requirements_are_met_by_the_tested_set() -> None:
    from packaging.requirements import Requirement

    pins: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins.setdefault(pin.name.lower(), []).append(pin)
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if not line or line.startswith(("#", "-r")):
                continue
            wanted = Requirement(line)
            for python in ("3.10", "3.11", "3.12", "3.13"):
                environment = {"python_version": python}
                tested = [
                    p for p in pins[wanted.name.lower()] if p.marker is None or p.marker.evaluate(environment)
                ]
                assert len(tested) == 1, f"{wanted.name} on Python {python}"
                (version,) = (clause.version for clause in tested[0].specifier)
                assert wanted.specifier.contains(version), f"{wanted} is not met by {version}"


def test_ci_runs_the_tests_and_nothing_else() -> None:
    ci = ROOT / ".ci/run"
    assert os.access(ci, os.X_OK)
    assert ci.read_text().splitlines()[1:] == ["exec make test"]


def test_the_licence_is_named_alike_everywhere() -> None:
    assert 'license = { text = "Apache-2.0" }' in (ROOT / "pyproject.toml").read_text()
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
