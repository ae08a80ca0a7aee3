"""So that `python -m pytest benchmarks` finds and runs the suites, which the tests' settings leave out."""

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Collects bench_*.py, and takes back --benchmark-skip."""
    config.addinivalue_line("python_files", "bench_*.py")
    config.option.benchmark_skip = False


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    torch.set_num_threads(2)
