"""Lets pytest run any tests of the CPU with the CUDA kernels, built as C++ for the host:

PYODE_CUDA_ON_HOST=FOLDER/_C....so PYTHONPATH=tests python -m pytest -p cuda_on_host.plugin tests/test_ops.py

As far as the code between can tell, every state is on a GPU: steps are read back by flags, nothing is reused.
"""

from __future__ import annotations

import importlib.util
import os
import sys


def _load() -> None:
    assert "pyode" not in sys.modules, "pyode was imported before its module could be replaced"
    spec = importlib.util.spec_from_file_location("pyode._C", os.environ["PYODE_CUDA_ON_HOST"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["pyode._C"] = module
    from pyode._ops import native

    assert native.build_info()["cuda"] == "on the host"
    native.on_gpu = lambda device: True
    native.current_stream = lambda device: 0


_load()
