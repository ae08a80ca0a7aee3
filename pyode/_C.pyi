"""The compiled module (csrc/bindings). An array is an address or an object with a data_ptr() method."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

MAX_STAGES: int
MAX_DEGREE: int
STATE_WORDS: int
COMPILER: str
CUDA: str | None

def simd_level() -> str: ...
def join_team(team: int) -> None: ...
def prefer_large_pages(array: Any, bytes: int, /) -> None: ...

class Layout:
    def __init__(
        self,
        scalar: int,
        is_complex: bool,
        samples: int,
        size: int,
        segments: list[int],
        threads: int,
        cuda: bool,
        stream: int,
        segments_on_device: Any,
        make_state: Callable[[Any], Any],
        storage_uses: Callable[[int], int] | None,
        /,
    ) -> None: ...
    @property
    def error_parts(self) -> int: ...

class Table:
    def __init__(
        self,
        rows: tuple[tuple[float, ...], ...],
        weights: tuple[float, ...],
        error_weights: tuple[float, ...],
        /,
    ) -> None: ...

class Controller:
    def __init__(
        self,
        layout: Layout,
        time_scalar: int,
        state: Any,
        stride: int,
        flags: Any,
        abscissae: tuple[float, ...],
        times: Any,
        trial_times: Any,
        make_times: Callable[[Any], Any],
        make_trial_times: Callable[[Any], Any],
        storage_uses: Callable[[int], int] | None,
        /,
    ) -> None: ...
    def set_policy(
        self,
        safety: float,
        ifactor: float,
        dfactor: float,
        min_step: float,
        max_step: float,
        order: float,
        beta: tuple[float, float, float],
        alpha: tuple[float, float],
        least_ulps: float,
        cautious: bool,
        max_num_steps: int,
        clip: bool,
        count_per_output: bool,
        resume: bool,
        /,
    ) -> None: ...
    def set_grid(
        self,
        times: Any,
        n_times: int,
        per_sample: bool,
        step_t: Any,
        n_step_t: int,
        jump_t: Any,
        n_jump_t: int,
        jumps_per_sample: bool,
        /,
    ) -> None: ...
    def set_norm(self, means: Any, n_segments: int, parts: int, /) -> None: ...
    def run(self, phase: int, first_step: float, /) -> int: ...
    @property
    def stage_times(self) -> Any: ...
    @property
    def turn(self) -> int: ...
    def stay_on_device(self, condition: int, /) -> None: ...

class Interpolant:
    def __init__(self, coefficients: tuple[tuple[float, ...], ...], end: tuple[float, ...], /) -> None: ...
    def weights_at(self, x: float, /) -> tuple[float, ...]: ...

class Steps:
    def __init__(
        self,
        layout: Layout,
        table: Table,
        interpolant: Interpolant,
        controller: Controller,
        rtol: Any,
        atol: Any,
        read_flags: Callable[[int], int],
        one: Any,
        /,
    ) -> None: ...
    def take(self, y: Any, ks: list[Any], dynamics: Any, out: Any, t0: Any, /) -> tuple[Any, Any, int, Any]: ...

class GridTimes:
    def __init__(
        self,
        layout: Layout,
        times: Any,
        sizes: Any,
        bytes: int,
        like: Any,
        make_times: Callable[[Any], Any],
        storage_uses: Callable[[int], int] | None,
        /,
    ) -> None: ...
    @property
    def under_way(self) -> int: ...

class AdamsTable:
    def __init__(
        self, predictors: tuple[tuple[float, ...], ...], correctors: tuple[tuple[float, ...], ...], max_iters: int, /
    ) -> None: ...

class Inspector:
    def __init__(
        self, type: type, exchange: Any, storage_uses: Callable[[int], int] | None, unshared: Any, /
    ) -> None: ...

class Calls:
    n: int
    def __init__(self, inspector: Inspector, direct: bool, watch: bool, /) -> None: ...
    def restart(self) -> None: ...
    def settle(self, k: Any, /) -> bool: ...
    @property
    def settled(self) -> bool: ...
    @property
    def copies(self) -> bool: ...

class SolveAgain:
    def __init__(self, loop: Any, /) -> None: ...

class Kind: ...

class Kinds:
    def __init__(
        self,
        inspector: Inspector,
        backend: ContextVar[str],
        grad_enabled: Callable[[], bool],
        transform: Callable[[], Any],
        threads: Callable[[], int],
        forward_mode: Any,
        /,
    ) -> None: ...
    def of(self, y0: Any, t: Any, rtol: Any, atol: Any, others: Any, /) -> Kind | None: ...

class IdleLoops:
    def __init__(
        self, kinds: Kinds, callbacks: tuple[str, ...], inference_mode: Callable[[], bool], most: int, /
    ) -> None: ...
    def solve(
        self, func: Any, y0: Any, t: Any, rtol: Any, atol: Any, method: Any, options: Any, args: Any, /
    ) -> tuple[Any, Any, Kind | None]: ...
    def put(self, kind: Kind, loop: Any, /) -> None: ...
    def clear(self) -> None: ...
    def __len__(self) -> int: ...

class Guards:
    def __init__(
        self,
        items: list[tuple[Any, Any, Any]],
        cells: list[tuple[Any, Any]],
        functions: list[tuple[Any, Any, Any, Any]],
        containers: list[tuple[Any, Any]],
        /,
    ) -> None: ...
    def hold(self, altered: Callable[[Any, Any], bool], /) -> bool: ...

class Forms:
    def __init__(self, inspector: Inspector, tensors: list[Any], /) -> None: ...
    def hold(self) -> bool: ...

def stage_combine(layout: Layout, weights: tuple[float, ...], y: Any, ks: list[Any], dt: Any, out: Any, /) -> None: ...
def stages(
    layout: Layout, table: Table, y: Any, ks: list[Any], dt: Any, times: tuple[Any, ...], dynamics: Any, given: Any, /
) -> Any: ...
def take_grid_steps(
    grid: GridTimes,
    table: Table,
    y: Any,
    ks: list[Any],
    dynamics: Any,
    begin: int,
    end: int,
    out: Any,
    out_bytes: int,
    /,
) -> tuple[Any, Any]: ...
def take_adams_steps(
    grid: GridTimes,
    table: AdamsTable,
    y: Any,
    ks: list[Any],
    m: int,
    dynamics: Any,
    begin: int,
    end: int,
    zero: Any,
    rtol: Any,
    atol: Any,
    out: Any,
    out_bytes: int,
    /,
) -> tuple[Any, Any, int, int, bool]: ...
def stage_vjp(layout: Layout, weights: tuple[float, ...], g: Any, dt: Any, outs: list[Any], /) -> None: ...
def error_norm(
    layout: Layout,
    weights: tuple[float, ...],
    y0: Any,
    y1: Any,
    ks: list[Any],
    dt: Any,
    rtol: Any,
    atol: Any,
    means: Any,
    parts: int,
    /,
) -> None: ...
def interpolate(
    layout: Layout,
    interpolant: Interpolant,
    controller: Controller,
    y: Any,
    ks: list[Any],
    out: Any,
    out_stride: int,
    /,
) -> None: ...
def opposites(layout: Layout, f: Any, g: Any, one: Any, out: Any, offset: int, /) -> None: ...
def select_rows(layout: Layout, moved: Any, stayed: Any, accepted: Any, out: Any, /) -> None: ...
def call_compiled(
    function: int, arguments: int, workspace: int, threads: int, inputs: list[Any], dtype: Any, /
) -> bool: ...

# Where it is built with CUDA.
def finish_step(
    layout: Layout,
    interpolant: Interpolant,
    controller: Controller,
    y: Any,
    ks: list[Any],
    y1: Any,
    out: Any,
    out_stride: int,
    stage: Any,
    w: float,
    /,
) -> None: ...
def end_step(
    layout: Layout,
    table: Table,
    interpolant: Interpolant,
    controller: Controller,
    rtol: Any,
    atol: Any,
    y: Any,
    ks: list[Any],
    y1: Any,
    out: Any,
    out_stride: int,
    stage: Any,
    w: float,
    /,
) -> None: ...

class GraphLoop:
    @property
    def condition(self) -> int: ...
    def assemble(self, opening: int, body: int, /) -> None: ...
    def launch(self, stream: int, /) -> None: ...
