"""patch_torchdiffeq: what programs and libraries that import torchdiffeq find, and how it ends."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from problems import tensor

import pyode

ROOT = Path(__file__).parents[1]


@pytest.fixture
def patched(monkeypatch):
    """A process where torchdiffeq has not been imported, patched."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchdiffeq"]:
        monkeypatch.delitem(sys.modules, name)
    with pyode.patch_torchdiffeq():
        yield importlib.import_module("torchdiffeq")


def in_a_new_process(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_its_public_names_are_pyodes(patched):
    for name in ("odeint", "odeint_adjoint", "odeint_event", "odeint_dense"):
        assert getattr(patched, name) is getattr(pyode, name) is getattr(patched._impl, name)
    assert patched.__version__ == "0.2.5"
    assert find_spec("torchdiffeq") is not None  # what libraries ask to see whether it is there


def test_every_way_of_importing_it_leads_to_pyode(patched):
    from torchdiffeq import odeint as first
    from torchdiffeq import odeint_adjoint as second
    from torchdiffeq._impl import odeint as third
    from torchdiffeq._impl.adjoint import find_parameters, odeint_adjoint
    from torchdiffeq._impl.odeint import SOLVERS, odeint

    assert first is third is odeint is pyode.odeint
    assert second is odeint_adjoint is pyode.odeint_adjoint
    assert {"dopri5", "rk4"} <= set(SOLVERS)
    assert [p.shape for p in find_parameters(torch.nn.Linear(2, 3))] == [(3, 2), (3,)]
    y = odeint(lambda t, y: -y, tensor(1.0), tensor(0.0, 1.0), method="dopri5")
    assert y[-1].item() == pytest.approx(torch.exp(tensor(-1.0)).item(), rel=1e-6)


def test_norms_are_torchdiffeqs(patched):
    import torchdiffeq._impl.misc as ours

    torch.manual_seed(0)
    parts = (torch.randn(3, 2), torch.randn(4))
    flat = torch.cat([part.reshape(-1) for part in parts])
    assert torch.allclose(ours._rms_norm(flat), flat.norm() / 10**0.5)
    assert ours._linf_norm(flat) == flat.abs().max()
    assert ours._zero_norm(flat) == 0
    assert ours._mixed_norm(parts) == max(ours._rms_norm(part) for part in parts)
    assert ours._mixed_norm(()) == 0
    for i, part in enumerate(ours._flat_to_shape(torch.stack([flat, -flat]), (2,), [part.shape for part in parts])):
        assert torch.equal(part, torch.stack([parts[i], -parts[i]]))


@pytest.mark.parametrize("statement", [
    "import torchdiffeq._impl.solvers",
    "import torchdiffeq._impl.rk_common as rk",
    "from torchdiffeq._impl.solvers import FixedGridODESolver",
    "from torchdiffeq._impl.misc import _check_inputs",
    "from torchdiffeq import nothing",
    "import torchdiffeq.nothing",
])  # fmt: skip
def test_what_is_not_there_is_an_import_error_that_says_what_is(patched, statement):
    with pytest.raises(ImportError, match=r"pyode is in torchdiffeq's place.*odeint_event.*_impl\.odeint\.SOLVERS"):
        exec(statement)


def test_an_attribute_that_is_not_there_is_an_attribute_error_that_says_what_is(patched):
    with pytest.raises(AttributeError, match=r"has no torchdiffeq\._impl\.solvers; it has odeint, "):
        _ = patched._impl.solvers
    assert not hasattr(patched, "__wrapped__")
    assert getattr(patched, "nothing", None) is None


@pytest.mark.filterwarnings("ignore:torchdiffeq was imported before")
def test_there_is_a_way_back():
    real = importlib.import_module("torchdiffeq")
    finders = list(sys.meta_path)
    with pyode.patch_torchdiffeq():
        assert sys.modules["torchdiffeq"] is not real
    assert sys.modules["torchdiffeq"] is real
    assert sys.modules["torchdiffeq._impl.odeint"].odeint is real.odeint
    assert sys.meta_path == finders


def test_twice_is_once(patched):
    with pyode.patch_torchdiffeq():
        assert sys.modules["torchdiffeq"] is patched
    assert sys.modules["torchdiffeq"] is patched  # the first call's end ends it


def test_torchdiffeq_need_not_be_installed():
    code = """
        import sys

        class Absent:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name.partition(".")[0] == "torchdiffeq":
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Absent)
        import pyode
        pyode.patch_torchdiffeq()
        from torchdiffeq import odeint
        assert odeint is pyode.odeint
        print("done")
    """
    assert in_a_new_process(code) == "done"


def test_modules_that_had_imported_it_are_named(tmp_path, monkeypatch):
    programs = {
        "by_module": "import torchdiffeq",
        "by_name": "from torchdiffeq import odeint_adjoint as odeint",
        "by_inside": "from torchdiffeq._impl.odeint import SOLVERS as solvers, odeint_event",
        "not_at_all": "import torch",
    }
    for name, text in programs.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    for name in programs:
        importlib.import_module(name)
    monkeypatch.setitem(sys.modules, "known_by_two_names", sys.modules["by_name"])
    with pytest.warns(UserWarning, match="torchdiffeq was imported before") as caught, pyode.patch_torchdiffeq():
        pass
    (message,) = caught
    assert message.filename == __file__
    named = str(message.message).split("used by ")[1].split(";")[0].split(", ")
    assert {"by_module", "by_name", "by_inside"} <= set(named)
    assert not {"not_at_all", "known_by_two_names"} & set(named)
    assert not any(name.startswith("torchdiffeq") for name in named)


@pytest.mark.skipif(not find_spec("torchcde"), reason="torchcde is not installed")
def test_torchcde_runs_on_it_with_the_same_result():
    code = """
        import sys, warnings
        warnings.simplefilter("ignore")  # torchcde's own
        import torch
        if "patched" in sys.argv:
            import pyode
            pyode.patch_torchdiffeq()
        import torchcde

        class Field(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = torch.nn.Linear(3, 6)

            def forward(self, t, z):
                return torch.tanh(self.linear(z)).view(*z.shape, 2)

        print(torchcde.solver.torchdiffeq.odeint.__module__.split(".")[0])
        torch.manual_seed(0)
        x, z0 = torch.randn(4, 5, 2).cumsum(1).double(), torch.randn(4, 3).double()
        spline = torchcde.CubicSpline(torchcde.natural_cubic_coeffs(x))
        line = torchcde.LinearInterpolation(torchcde.linear_interpolation_coeffs(x))
        for path, adjoint in ((spline, True), (line, False)):
            field = Field().double()
            options = {"jump_t": path.grid_points}  # where else both have errors of 1e-5
            z = torchcde.cdeint(
                path, field, z0, path.interval, adjoint=adjoint, rtol=1e-7, atol=1e-9, options=options
            )
            z.square().sum().backward()
            print(*z.flatten().tolist(), *field.linear.weight.grad.flatten().tolist())
    """
    lines = {}
    for patched in ("patched", "as it is"):
        command = [sys.executable, "-c", textwrap.dedent(code), patched]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        lines[patched] = done.stdout.strip().splitlines()
    assert lines["patched"][0] == "pyode"
    assert lines["as it is"][0] == "torchdiffeq"
    for row in zip(*(of[1:] for of in lines.values())):
        ours, theirs = (tensor(*map(float, line.split())) for line in row)
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
