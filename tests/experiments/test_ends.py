"""How the measurements and the demo end."""

import pytest

from experiments import demo, run
from utils.errors import UserError


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (UserError("is\ngone", "a.pt", "fetch it"), 1, "error: a.pt: is gone"),
    ],
)
@pytest.mark.parametrize(("module", "name"), [(run, "Runner"), (demo, "check_start")])
def test_what_ends_them_is_one_line_as_of_the_scripts(
    monkeypatch, capsys, tmp_path, module, name, error, code, told
):
    def fail(*_):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr("sys.argv", [module.__name__])
    assert module.main() == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(told)
