"""The devices and dtypes that tests run on, and a clean state around each of them."""

from __future__ import annotations

import gc
import os

import hypothesis
import pytest
import torch

from pyode.compiled import build
from pyode.stepping import newton

hypothesis.settings.register_profile("pyode", deadline=None, max_examples=25, derandomize=True, database=None)
hypothesis.settings.load_profile("pyode")

ON_CPU = pytest.param("cpu", marks=pytest.mark.device)
ON_CUDA = pytest.param("cuda", marks=[pytest.mark.device, pytest.mark.cuda])
OPTIMISED = build.FLAGS
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bfloat16, torch.float16)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite is shared among processes of one thread each, if pytest-xdist is there; -n 0 keeps it in one."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    # The processes call this too, and share no more.
    alone = config.option.usepdb or config.option.collectonly or "PYTEST_XDIST_WORKER" in os.environ
    if whole and not alone and getattr(config.option, "numprocesses", 0) is None:
        config.option.numprocesses, config.option.dist = min(os.cpu_count() or 1, 8), "worksteal"
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """What is there before the first test stays: no collection of garbage looks at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=[ON_CPU, ON_CUDA] if torch.cuda.is_available() else [ON_CPU])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device of this machine."""
    return torch.device(request.param)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each dtype that a state may have."""
    return request.param


@pytest.fixture(autouse=True)
def _clean_state():
    """The same random numbers in every test, and the number of threads as it was."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _quickly_compiled(tmp_path_factory: pytest.TempPathFactory):
    """Compiled dynamics are hardly optimised, and kept in a folder of this session's, one for all its processes."""
    quickly = tuple("-Og" if flag == "-O2" else flag for flag in OPTIMISED if flag != "-fpeel-loops")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "FLAGS", quickly)
        patch.setenv("PYODE_CACHE_DIR", str(folder / "compiled"))
        yield


@pytest.fixture
def _optimised(monkeypatch, tmp_path):
    """Compiled dynamics are as fast as users have them."""
    monkeypatch.setattr(build, "FLAGS", OPTIMISED)
    monkeypatch.setenv("PYODE_CACHE_DIR", str(tmp_path))


@pytest.fixture(params=["factors", "gmres"])
def by(request, monkeypatch):
    """Either way of solving Newton's linear systems, whatever the size."""
    monkeypatch.setattr(newton, "DIRECT_UNKNOWNS", 10**6 if request.param == "factors" else 0)
    return request.param


@pytest.fixture
def _nothing_captured():
    """No captured solve is kept from one test to the next; no gradients unless they are enabled."""
    from pyode.captures import captured_solves

    captured_solves.clear()
    with torch.no_grad():
        yield
    captured_solves.clear()
