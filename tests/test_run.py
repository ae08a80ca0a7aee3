"""python -m pyode run: a program runs as it does under python, but on pyode."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyode.__main__ import main

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
from helper import where  # beside it
print(__name__, where, sys.argv, sys.path[0], __file__, sys.modules["__main__"].__dict__ is globals())
if "solve" in sys.argv:
    import torch, torchdiffeq
    from torchdiffeq import odeint_adjoint as odeint
    print(torchdiffeq.odeint.__module__)
    print(odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]), adjoint_params=()).shape)
"""


@pytest.fixture
def program(tmp_path):
    """A script in a package's folder, with a module beside it."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "script.py").write_text(PROGRAM)
    for place in (folder, tmp_path):
        (place / "helper.py").write_text(f"where = {str(place)!r}")
    return folder / "script.py"


@pytest.fixture
def in_process(monkeypatch):
    """Runs a command here, and puts back what it changes."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before, finders = dict(sys.modules), sys.meta_path.copy()
    yield lambda *arguments: main(["run", *map(str, arguments)])
    sys.meta_path[:] = finders
    for name in set(sys.modules) - set(before):
        if name.partition(".")[0] in ("torchdiffeq", "helper", "package"):
            del sys.modules[name]
    sys.modules.update({name: module for name, module in before.items() if name.startswith("torchdiffeq")})


def python(*arguments, cwd) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=120, cwd=cwd, env=environment
    )


def test_a_script_knows_its_file_wherever_it_goes(program):
    program.write_text("import os, sys; print(__file__, os.path.basename(sys.argv[0]), sys.path[0])")
    theirs, ours = (python(*how, "script.py", cwd=program.parent) for how in ([], ["-m", "pyode", "run"]))
    assert ours.stdout == theirs.stdout != ""


@pytest.mark.parametrize("how", [["script"], ["-m"]], ids=str)
def test_a_program_sees_what_it_sees_under_python(program, how):
    cwd = program.parents[1]
    target = ["-m", "package.script"] if how == ["-m"] else [program]
    arguments = ["--help", "-m", "x", "--", "--version", "y z"]
    theirs = python(*target, *arguments, cwd=cwd)
    ours = python("-m", "pyode", "run", *target, *arguments, "solve", cwd=cwd)
    assert ours.returncode == theirs.returncode == 0, ours.stderr + theirs.stderr
    seen, solver, shape = ours.stdout.splitlines()
    assert seen.replace(", 'solve'", "") == theirs.stdout.strip()
    assert solver == "pyode.odeint"
    assert shape == "torch.Size([2, 1])"


@pytest.mark.filterwarnings("ignore:torchdiffeq was imported before")
class TestHowItEnds:
    def test_an_exit_code_passes_through(self, in_process, tmp_path):
        (tmp_path / "leaves.py").write_text("raise SystemExit(7)")
        with pytest.raises(SystemExit) as caught:
            in_process(tmp_path / "leaves.py")
        assert caught.value.code == 7

    def test_an_exception_passes_through_with_its_traceback(self, in_process, tmp_path):
        (tmp_path / "fails.py").write_text("def f():\n    raise KeyError('mine')\nf()")
        with pytest.raises(KeyError, match="mine") as caught:
            in_process(tmp_path / "fails.py")
        last = caught.traceback[-1]
        assert (Path(last.path), last.lineno, last.name) == (tmp_path / "fails.py", 1, "f")

    def test_a_program_that_ends_well_is_a_success(self, in_process, tmp_path):
        (tmp_path / "fine.py").write_text("import torchdiffeq; assert torchdiffeq.odeint.__module__ == 'pyode.odeint'")
        assert in_process(tmp_path / "fine.py") == 0

    def test_a_script_that_is_not_there_is_told_as_python_does(self, in_process, tmp_path, capsys):
        assert in_process(tmp_path / "nothing.py", "x") == 2
        assert "can't open file" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["nothing_of_this_name", "nothing_of_this_name.inside", "torch.nothing_inside"])
    def test_a_module_that_is_not_there_is_told_as_python_does(self, in_process, capsys, name):
        assert in_process("-m", name) == 1
        assert f"no module named {name!r}" in capsys.readouterr().err

    def test_what_a_package_fails_to_import_is_no_missing_module(self, in_process, tmp_path, monkeypatch):
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / "__init__.py").write_text("import nothing_of_this_name")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ImportError, match="nothing_of_this_name"):
            in_process("-m", "package.module")


def test_help_says_what_it_does(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["run", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "SCRIPT | -m MODULE" in text
    assert "torchdiffeq's place" in text


@pytest.mark.parametrize("arguments", [["run"], ["run", "-m"]])
def test_nothing_to_run_is_all_that_is_missing(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("the following arguments are required: SCRIPT | MODULE\n")
