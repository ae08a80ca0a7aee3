"""CUDA graphs as torch captures them, for a loop that the device drives."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import native


class Graph:
    """Work on a GPU that is captured once and launched as one.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graphs: list[torch.cuda.CUDAGraph] = []  # they own the memory that was allocated while capturing
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._used: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Within it work is done on a stream of its own, after all before, and before all behind."""
        outside = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outside.wait_stream(self._stream)

    def capture(self, *works: Callable[[], None]) -> None:
        """Captures work, without doing it; to be called aside. The memory that it works on is used ever after.

        Raises:
            RuntimeError: something can't be captured.
        """
        pool = torch.cuda.graph_pool_handle()
        collects = gc.isenabled()
        gc.disable()  # what it would free can't be freed while a stream is captured
        # The memory in which cuBLAS works is then allocated with the rest: two loops may run side by side.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            self._graphs = [self._captured(work, pool) for work in works]
        finally:
            torch._C._cuda_clearCublasWorkspaces()
            if collects:
                gc.enable()

    def _new(self) -> torch.cuda.CUDAGraph:
        return torch.cuda.CUDAGraph()

    def _captured(self, work: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
        graph = self._new()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            work()
        except BaseException:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            with contextlib.suppress(RuntimeError):  # where the former has not come to it
                torch._C._cuda_endAllocateToPool(self.device.index, pool)
            with contextlib.suppress(RuntimeError):  # the generator of random numbers would wait for a capture's end
                generator = torch.cuda.default_generators[self.device.index]
                generator.graphsafe_set_state(generator.clone_state())
            raise
        graph.capture_end()
        return graph

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it the memory is the current stream's, after whoever had it before."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self._used)
        try:
            yield
        finally:
            self._used.record(stream)

    def launch(self) -> None:
        """On the current stream, in use."""
        self._graphs[0].replay()

    def wait(self) -> None:
        """Until the last use is over, on the device too."""
        self._used.synchronize()


class GraphLoop(Graph):
    """An opening, and a body that the device repeats: the two works that are captured.

    Args:
        device: the GPU.

    Attributes:
        condition: what a kernel sets to have the body repeated, or not.

    Raises:
        RuntimeError: there is no such thing here.
    """

    def __init__(self, device: torch.device) -> None:
        if not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph"):
            raise RuntimeError(f"torch {torch.__version__} does not give out the graphs that it captures")
        super().__init__(device)
        self.handle = native.graph_loop()
        self.condition = self.handle.condition

    def capture(self, *works: Callable[[], None]) -> None:
        """See Graph."""
        super().capture(*works)
        self.handle.assemble(*(graph.raw_cuda_graph() for graph in self._graphs))

    def _new(self) -> torch.cuda.CUDAGraph:
        return torch.cuda.CUDAGraph(keep_graph=True)

    def launch(self) -> None:
        """See Graph."""
        self.handle.launch(native.current_stream(self.device))


def random_state(device: torch.device) -> Tensor:
    """Changes with every random number that is drawn on a GPU."""
    return torch.cuda.get_rng_state(device)


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
