"""What holds pyode together: who includes and imports whom, and what an import costs."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyode._ops import native
from pyode.methods import TABLEAUS

ROOT = Path(__file__).parents[1]
PACKAGE = Path(importlib.util.find_spec("pyode").origin).parent
SOURCES = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
MODULES = [path for path in PACKAGE.rglob("*.py") if path.stem != "__main__" and "commands" not in path.parts]

# Public functions -> gradients -> stepping -> methods, control, state -> _ops -> errors: imports point downwards.
LAYERS = {
    "__init__": 10, "patch": 9, "solve_ivp": 8, "dense": 7, "events": 7, "adjoint": 7, "samples": 6.5, "odeint": 6,
    "taped": 5.8, "solving": 5.7, "again": 5.65, "caches": 5.6, "device_backsolve": 5.65,
    "device_backsolve_samples": 5.65, "device_loop": 5.6,
    "device_grid": 5.58, "device_grid_backsolve": 5.6, "device_solve": 5.55,
    "problem": 5.5, "vmapped": 5.5,
    "captures": 5.2, "progress": 5, "compiled": 5, "gradients": 4, "callbacks": 4,
    "stepping": 3, "circumstances": 2, "control": 2, "state": 2, "methods": 2, "parameters": 1, "compiling": 1,
    "solution": 1, "_ops": 1,
    "errors": 0, "tree": 0, "_version": 0, "_C": 0,
}  # fmt: skip
# control.py is told about methods and states; odeint passes {"gradient": "adjoint"} on, and imports it only then.
# Within one level nobody else imports anybody but errors.
SAME_LEVEL = {("odeint", "adjoint"), ("control", "methods"), ("control", "state")}


def imports_of(path: Path) -> set[str]:
    """The modules of pyode that a file imports, as top-level names; others with their first name."""
    package = ["pyode", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            # "from . import x" imports a module x; so may "from .y import x".
            found |= {".".join([*base, alias.name]) for alias in node.names} if base == ["pyode"] else {".".join(base)}
            if any(alias.name == "_C" for alias in node.names):
                found.add("pyode._C")
    return found


def layer_of(name: str) -> str | None:
    """The part of pyode that a dotted module name belongs to."""
    parts = name.split(".")
    return parts[1] if parts[0] == "pyode" and len(parts) > 1 and parts[1] in LAYERS else None


@pytest.mark.skipif(not SOURCES, reason="an installed package without its sources")
class TestNativeCode:
    def test_it_never_sees_torch(self):
        for path in SOURCES:
            includes = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
            assert not [name for name in includes if re.match(r"(torch|ATen|c10|caffe2)\b", name)], path

    def test_pybind11_is_known_to_the_bindings_only(self):
        assert {path.parent.name for path in SOURCES if "pybind11" in path.read_text()} == {"bindings"}

    def test_includes_point_downwards(self):
        rank = {"core": 0, "compiled": 1, ".": 1, "cpu": 2, "cuda": 2, "bindings": 3}
        for path in SOURCES:
            here = path.parent.name if path.parent.name in rank else "."
            for name in re.findall(r'#\s*include\s*"([^"]+)', path.read_text()):
                target = (path.parent / name).resolve()
                assert target.exists(), (path, name)
                there = target.parent.name if target.parent.name in rank else "."
                assert there == here or rank[there] < rank[here], (path.name, name)

    def test_both_backends_have_the_same_files(self):
        ops = {path.stem for path in SOURCES if path.parent.name == "cuda" and path.suffix == ".cu"}
        ops -= {"graph_loop", "end_step"}  # of a loop on the device
        assert ops <= {path.stem for path in SOURCES if path.parent.name == "cpu"}
        assert ops == {"control", "error_norm", "interpolate", "stage_combine"}

    def test_core_neither_allocates_nor_throws(self):
        for path in SOURCES:
            if path.parent.name == "core":
                code = re.sub(r"//.*", "", path.read_text())
                assert not re.findall(r"\b(new|malloc|throw|std::vector|std::string|try|catch)\b", code), path


def test_only_one_module_imports_the_compiled_one():
    importers = [
        path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if "pyode._C" in imports_of(path)
    ]
    assert importers == ["_ops/native.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path):
    here = layer_of(".".join(["pyode", *path.relative_to(PACKAGE).with_suffix("").parts]))
    assert here in LAYERS
    for name in imports_of(path):
        there = layer_of(name)
        if there is not None and there != here:
            assert LAYERS[there] < LAYERS[here] or (here, there) in SAME_LEVEL, f"{here} imports {there}"


def in_a_new_process(code: str, **environment: str) -> str:
    command, env = [sys.executable, "-c", code], {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, cwd=ROOT, env=env)
    return done.stdout.strip()


def test_importing_pyode_imports_no_extra():
    code = "import torch, sys; before = set(sys.modules); import pyode; print(*{*sys.modules} - before)"
    extras = {"matplotlib", "tqdm", "torchdiffeq", "scipy", "pytest", "hypothesis", "rich", "tabulate", "sklearn"}
    assert not extras & set(in_a_new_process(code).split())


def test_importing_pyode_is_quick(tmp_path):
    # Beside torch's own second: under 50 ms, of the process's own time and the best of four. Where a busy machine takes
    # longer for torch, pyode may, too. The first compiles the sources, which an installed package has done.
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    # A collection of torch's many objects takes 100 ms, and falls due wherever their number says so.
    code = (
        "import gc, time; gc.disable(); now = time.process_time; a = now(); import torch; b = now(); import pyode; "
        "print(b - a, now() - b)"
    )
    tries = [[float(x) for x in in_a_new_process(code, **compiled).split()] for _ in range(4)]
    assert any(ours < 0.05 * max(torchs, 1) for torchs, ours in tries), tries


def test_importing_pyode_does_not_start_cuda_or_threads():
    code = "import torch, threading, pyode; print(torch.cuda.is_initialized(), threading.active_count())"
    assert in_a_new_process(code) == "False 1"


@pytest.mark.parametrize(("wanted", "message"), [
    ("1", "PYODE_CUDA=1, but nvcc was found neither on PATH nor in CUDA_HOME"),
    ("yes", "PYODE_CUDA must be auto, 1 or 0, not 'yes'"),
])  # fmt: skip
def test_a_build_that_insists_on_a_missing_nvcc_says_so(wanted, message, tmp_path):
    pytest.importorskip("pybind11")
    pytest.importorskip("setuptools")
    environment = {**os.environ, "PYODE_CUDA": wanted, "CUDA_HOME": str(tmp_path), "PATH": str(tmp_path)}
    environment.pop("CUDACXX", None)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path],
        capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
@pytest.mark.parametrize("samples", [1, 7])
def test_sizes_beyond_two_billion_are_described_without_allocating(dtype, samples):
    size = 2**31 + 5
    layout = native.Layout(samples, size, (0, 2**31 + 1, size), dtype, torch.device("cpu"))
    assert layout.n_segments == 2
    assert layout.size == size
    assert layout.handle.error_parts >= 1


def test_the_longest_tableau_fits():
    longest = max(len(tableau.rows) + 1 for tableau in TABLEAUS.values())
    assert longest <= native._C.MAX_STAGES
    assert max(len(row) for tableau in TABLEAUS.values() for row in tableau.interpolant) <= native._C.MAX_DEGREE


def test_everything_public_is_documented():
    import pyode

    for name in pyode.__all__:
        assert name == "__version__" or getattr(pyode, name).__doc__, name
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", pyode.__version__)
