"""Lets pytest run any tests of the CPU with the CUDA kernels, built as C++ for the host:

PYODE_CUDA_ON_HOST=FOLDER/_C....so PYTHONPATH=tests python -m pytest -p cuda_on_host.plugin tests/test_ops.py

As far as the code between can tell, every state is on a GPU: steps are read back by flags, nothing is reused.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NOT_CAPTURED = {f"aten::{name}" for name in ("_local_scalar_dense", "equal", "nonzero", "lift_fresh", "masked_select")}


def _load() -> None:
    assert "pyode" not in sys.modules, "pyode was imported before its module could be replaced"
    spec = importlib.util.spec_from_file_location("pyode._C", os.environ["PYODE_CUDA_ON_HOST"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["pyode._C"] = module
    from pyode._ops import graph_loop, native
    from pyode.captures import LentFunc
    from pyode.compiled.guards import Guards

    assert native.build_info()["cuda"] == "on the host"
    native.on_gpu = lambda device: True
    native.current_stream = lambda device: 0
    graph_loop.random_state = lambda device: torch.get_rng_state()

    # What func finds in the place of its parameters while it is captured, it has to find when it is called again.
    replaced, stand_ins = Guards.replaced, []

    def noted(guards, others):
        stand_ins.append((guards, others))
        return replaced(guards, others)

    Guards.replaced = noted
    LentFunc.take_back = lambda func: None  # it is called again

    class Capture(TorchDispatchMode):
        """Within it most of what reads numbers back to the host, or makes tensors from the host's, fails."""

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            masks = op.name() == "aten::index.Tensor" and any(i is not None and i.dtype is torch.bool for i in args[1])
            if masks or op.name().split(".")[0] in NOT_CAPTURED:
                raise RuntimeError(f"{op} while a stream is captured")
            return op(*args, **(kwargs or {}))

    class Graph:
        """Does its work itself."""

        def __init__(self, device):
            self.aside = self.in_use = contextlib.nullcontext

        def capture(self, *works):
            self.parts = works, stand_ins[-1]
            with Capture():
                for work in works:
                    work()

        def launch(self):
            works, (guards, others) = self.parts
            with replaced(guards, others):
                self.do(*works)

        def do(self, work):
            work()

        def wait(self):
            pass

    class GraphLoop(Graph):
        """Repeats the body as the kernels on the host set the condition."""

        def __init__(self, device):
            super().__init__(device)
            self.handle = native._C.GraphLoop()
            self.condition = self.handle.condition

        def do(self, opening, body):
            goes_on = ctypes.c_uint.from_address(self.condition)
            goes_on.value = 1
            opening()
            while goes_on.value:
                body()

    graph_loop.Graph, graph_loop.GraphLoop = Graph, GraphLoop


_load()
