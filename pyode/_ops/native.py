"""The ops, compiled. The only module that imports pyode._C.

A tensor handed to an op is contiguous, and of the layout's dtype and device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import contract
from .contract import SCALARS, Flag, Grid, Phase, Policy, RightHandSide, largest
from .memory import as_view, exchange, pattern, storage_uses, unit_steps, with_views
from .openmp import address_of_team
from .transforms import transforming
from .words import Words


class Interpolant(_C.Interpolant):
    """For each stage the coefficients of x, x^2, ... in its weight, and the weights at x = 1."""

    def __init__(self, coefficients: tuple[tuple[float, ...], ...], end: tuple[float, ...]) -> None:
        super().__init__(coefficients, end)
        self.coefficients, self.end = coefficients, end


_TEAM = address_of_team()
_C.join_team(_TEAM)  # next to torch's ops ours run on the same threads

Inspector = _C.Inspector  # csrc/bindings/inspector.h
inspector = Inspector(Tensor, exchange, storage_uses, torch.empty(1, device="cpu"))

Calls = _C.Calls  # csrc/bindings/evaluator.h
Kind = _C.Kind  # csrc/bindings/kinds.h
Kinds = _C.Kinds
IdleLoops = _C.IdleLoops  # csrc/bindings/idle_loops.h
SolveAgain = _C.SolveAgain  # csrc/bindings/steps.h
call_compiled = _C.call_compiled  # csrc/bindings/compiled.h
Guards = _C.Guards  # csrc/bindings/guards.h
Forms = _C.Forms


def supports(y: Tensor) -> bool:
    """Whether the compiled ops can work on a tensor: a plain one, on a device and of a dtype that they know.

    Under torch.func's transforms and in forward-mode differentiation any tensor that func uses may be a wrapper, or
    carry a tangent: there the reference ops do the work.
    """
    return (
        type(y) in (Tensor, torch.nn.Parameter)
        and (y.is_cpu or (y.is_cuda and _C.CUDA is not None))
        and y.dtype in SCALARS
        and not transforming()
    )


def build_info() -> dict[str, str | None]:
    """The compiler of the module, its SIMD level and threads on this machine, the CUDA version it was built with."""
    threads = "torch's OpenMP threads" if _TEAM else "a pool of pyode's"
    return {"compiler": _C.COMPILER, "simd": _C.simd_level(), "threads": threads, "cuda": _C.CUDA}


def on_gpu(device: torch.device) -> bool:
    """Whether the CUDA backend serves a device."""
    return device.type == "cuda"


def current_stream(device: torch.device) -> int:
    """torch's stream for what is launched on a GPU now: a cudaStream_t."""
    return torch.cuda.current_stream(device).cuda_stream


class Layout(contract.Layout):
    """A layout with its compiled counterpart."""

    def __init__(
        self, samples: int, size: int, segments: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(samples, size, segments, dtype, device)
        width = 2 if dtype.is_complex else 1
        self.stride = samples * width * size  # real numbers a state
        offsets = [width * offset for offset in segments]
        cuda = on_gpu(device)
        lasting = cuda or torch.is_grad_enabled() or torch.is_inference_mode_enabled()
        self.storage_uses = None if lasting else storage_uses
        self.handle = _C.Layout(
            SCALARS[dtype],
            dtype.is_complex,
            samples,
            width * size,
            offsets,
            torch.get_num_threads(),
            cuda,
            current_stream(device) if cuda else 0,
            torch.tensor(offsets, device=device) if cuda else None,
            _new_like if not cuda and self.stride * self.real_dtype.itemsize >= _LARGE else torch.empty_like,
            self.storage_uses,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by what it was made from."""
        return type(self), (self.samples, self.size, self.segments, self.dtype, self.device)


_LARGE = 1 << 22  # bytes of a tensor whose first write is mostly the system's work


def _of_large_pages(new: Tensor) -> Tensor:
    if new.is_cpu and new.nbytes >= _LARGE:
        _C.prefer_large_pages(new, new.nbytes)
    return new


def new_states(n: int, y0: Tensor) -> Tensor:
    """A place for n states like y0, [n, ...]; a large one of large pages, where they are to be had."""
    return _of_large_pages(y0.new_empty((n, *y0.shape)))


def _new_like(y: Tensor) -> Tensor:
    return _of_large_pages(torch.empty_like(y))


class Table(_C.Table):
    """A method: its weights for every stage after the first, for the step, and for the error estimate."""

    def __init__(
        self, rows: tuple[tuple[float, ...], ...], weights: tuple[float, ...], error_weights: tuple[float, ...]
    ) -> None:
        super().__init__(rows, weights, error_weights)
        self.rows, self.weights, self.error_weights = rows, weights, error_weights


def stage_combine(
    layout: Layout, weights: tuple[float, ...], y: Tensor, ks: list[Tensor], dt: Tensor, out: Tensor | None = None
) -> Tensor:
    """Returns y + dt sum_j w_j k_j, which is written to `out` if that is given; dt is [B] float64."""
    out = torch.empty_like(y) if out is None else out
    _C.stage_combine(layout.handle, weights, y, ks, dt, out)
    return out


def stages(
    layout: Layout,
    table: Table,
    y: Tensor,
    ks: list[Tensor],
    dt: Tensor,
    times: tuple[Tensor, ...],
    dynamics: RightHandSide,
    given: Tensor | None = None,
) -> Tensor:
    """Evaluates a step's stages after the first: ks[j + 1] is the derivative at times[j] of row j's state.

    The first of several such states may be given.

    Returns the last state. func is called from the compiled loop. A state's memory serves again for a later one when
    nobody holds on to it.
    """
    return _C.stages(layout.handle, table, y, ks, dt, times, dynamics, given)  # type: ignore[no-any-return]


class Steps(_C.Steps):
    """The steps of an adaptive loop, with all that stays the same through its solves.

    `take(y, ks, dynamics, out, t0)` takes steps from y, whose derivative is ks[0], as the controller plans them, until
    there is something to decide. It goes on as long as all samples accept a step, or all reject it, and none is done,
    has failed, or has come to a discontinuity. Where t0 is given, not None, the solve begins: ks[0] is evaluated there,
    and the first step is chosen, with a further evaluation; y is the first output, and `out` a function of y that makes
    the place for them all.

    It returns the state at the start of the last step taken, that at its end, the controller's flags without OUTPUT,
    and that place: the outputs that the steps have passed are written to their rows of it. The last step's derivatives
    are in ks.

    Args:
        layout, controller, rtol, atol: of the loop.
        table, interpolant: of its method.
    """

    def __init__(
        self,
        layout: Layout,
        table: Table,
        interpolant: Interpolant,
        controller: Controller,
        rtol: float | Tensor,
        atol: float | Tensor,
    ) -> None:
        super().__init__(
            layout.handle, table, interpolant, controller.handle, rtol, atol, controller.read, controller.one
        )


class AdamsTable(_C.AdamsTable):
    """An Adams method: its predictors' weights, and its correctors' if it is implicit, after 1, 2, ... values of f.

    The first weight is that of f at a step's end, the second that of f at its start, and so on backwards.
    """


class GridSteps:
    """The steps of a given grid.

    Args:
        layout: of the state.
        times: [steps, stages] as func sees them.
        sizes: [steps] float64, signed.
    """

    def __init__(self, layout: Layout, times: Tensor, sizes: Tensor) -> None:
        self.layout, self.row_bytes = layout, layout.stride * layout.real_dtype.itemsize
        self.handle = _C.GridTimes(
            layout.handle, times.contiguous(), sizes.contiguous(), times.itemsize,
            pattern(times.shape[1:], times.dtype, times.device), with_views, layout.storage_uses,
        )  # fmt: skip

    @property
    def under_way(self) -> int:
        """The number of the step begun last; -1 before there is one."""
        return self.handle.under_way

    def take(
        self,
        table: Table,
        y: Tensor,
        ks: list[Tensor],
        dynamics: RightHandSide,
        begin: int,
        end: int,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Takes the steps of a Runge-Kutta method from `begin` to before `end`, one or more.

        Returns the state at the start of the last one and that at its end; its derivatives are in ks. The states at the
        ends of the steps before it are written to `out`, if it is given: that of step n to row n + 1.
        """
        return _C.take_grid_steps(self.handle, table, y, ks, dynamics, begin, end, out, self.row_bytes)

    def take_adams(
        self,
        table: AdamsTable,
        y: Tensor,
        ks: list[Tensor],
        m: int,
        dynamics: RightHandSide,
        begin: int,
        end: int,
        rtol: float | Tensor,
        atol: float | Tensor,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, int, int, bool]:
        """The same for an Adams method, up to a step whose equation functional iteration does not solve.

        Args:
            ks: a place for f at a step's end, m values of f where steps began, the newest first, and places for as many
                as the table has predictors.

        Returns the states, how many values of f there are then, the number of the last step, and whether its equation
        was solved. Its rise is measured by the tolerances, relative to itself, as in torchdiffeq.
        """
        zero = torch.zeros_like(y)
        return _C.take_adams_steps(
            self.handle, table, y, ks, m, dynamics, begin, end, zero, rtol, atol, out, self.row_bytes
        )


def copy(layout: Layout, y: Tensor, out: Tensor | None = None) -> Tensor:
    """Copies a state, to the beginning of `out` if given; by threads of our own, as torch's hang in a forked child."""
    out = torch.empty_like(y) if out is None else out
    _C.stage_combine(layout.handle, (), y, [], None, out)
    return out


def stage_vjp(layout: Layout, weights: tuple[float, ...], g: Tensor, dt: Tensor) -> list[Tensor | None]:
    """Returns [dt w_j g for every j], None where w_j is 0."""
    outs = [torch.empty_like(g) if w else None for w in weights]
    _C.stage_vjp(layout.handle, weights, g, dt, outs)
    return outs


def opposites(half: Layout, like: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns a function of f and g that makes [f, -g], like a tensor; `half` is the layout of each."""
    return partial(_opposites, half.handle, like, unit_steps(1, half.device), half.size * half.dtype.itemsize)


def _opposites(half: _C.Layout, like: Tensor, one: Tensor, offset: int, f: Tensor, g: Tensor) -> Tensor:
    out = torch.empty_like(like)
    _C.opposites(half, f, g, one, out, offset)
    return out


def select_rows(layout: Layout, moved: Tensor, stayed: Tensor, accepted: Tensor) -> Tensor:
    """Rows of `moved` where accepted, of `stayed` elsewhere."""
    out = torch.empty_like(moved)
    _C.select_rows(layout.handle, moved, stayed, accepted, out)
    return out


def mean_square_errors(
    layout: Layout,
    rows: Sequence[tuple[float, ...]],
    y0: Tensor,
    y1: Tensor,
    ks: list[Tensor],
    dt: Tensor,
    rtol: float | Tensor,
    atol: float | Tensor,
) -> list[float]:
    """For each row of weights the largest mean square over the segments, as Controller.error_norm notes them.

    Of a joint state. On CUDA this waits, once for all rows.
    """
    parts = layout.handle.error_parts
    means = torch.empty((len(rows), layout.n_segments, parts), dtype=torch.float64, device=layout.device)
    address, stride = means.data_ptr(), 8 * parts * layout.n_segments
    for i, weights in enumerate(rows):
        _C.error_norm(layout.handle, weights, y0, y1, ks, dt, rtol, atol, address + i * stride, parts)
    return [largest([sum(parts) for parts in segments]) for segments in means.tolist()]


class Controller(Words):
    """The step-size controller of all samples, and the norms it judges by.

    Args:
        layouts: of the state, and of further quantities that have a share in the norm.
        policy, grid: see there.
        abscissae: of the stages whose times are wanted, relative to the step.

    Attributes:
        one: [B] float64, a step size of 1.
    """

    def __init__(self, layouts: list[Layout], policy: Policy, grid: Grid, abscissae: tuple[float, ...]) -> None:
        state = layouts[0]
        B, device = state.samples, state.device
        self.layouts = layouts
        self._on_device = False
        self._grid = grid  # keeps the memory that the handle points to
        segments = sum(layout.n_segments for layout in layouts)
        self._parts = parts = max(layout.handle.error_parts for layout in layouts)
        super().__init__(B, segments, parts, device)
        self.one = unit_steps(B, device)
        shape = (len(abscissae),) if B == 1 else (len(abscissae), B)
        self.handle = handle = _C.Controller(
            state.handle, SCALARS[state.real_dtype], self._words, self._stride, self.address_of_flags, abscissae,
            pattern(shape, state.real_dtype, device), pattern(shape[1:], state.real_dtype, device),
            with_views, as_view, state.storage_uses,
        )  # fmt: skip
        handle.set_policy(
            policy.safety, policy.ifactor, policy.dfactor, policy.min_step, policy.max_step, policy.order,
            policy.beta, policy.alpha, policy.least_ulps, policy.cautious, policy.max_num_steps,
            policy.clip, policy.count_per_output, policy.resume,
        )  # fmt: skip
        step_t, jump_t = grid.step_t, grid.jump_t
        handle.set_grid(
            grid.times, len(grid.times), grid.times.dim() == 2,
            step_t, 0 if step_t is None else len(step_t),
            jump_t, 0 if jump_t is None else len(jump_t), jump_t is not None and jump_t.dim() == 2,
        )  # fmt: skip
        handle.set_norm(self.address_of_means(), segments, parts)

    def error_norm(
        self,
        weights: tuple[float, ...],
        y0: Tensor,
        y1: Tensor,
        ks: list[Tensor],
        dt: Tensor,
        rtol: float | Tensor,
        atol: float | Tensor,
        slot: int = 0,
        layout: Layout | None = None,
    ) -> None:
        """Notes the mean squares of |dt sum_j w_j k_j| / (atol + rtol max(|y0|, |y1|)), from segment `slot` on."""
        handle = (layout or self.layouts[0]).handle
        _C.error_norm(handle, weights, y0, y1, ks, dt, rtol, atol, self.address_of_means(slot), self._parts)

    def run(self, phase: Phase, first_step: float = 0.0, unseen: int = 0) -> int:
        """Carries out a phase for all samples; returns the flags. On CUDA this waits for the device, but for `unseen`
        flags, which are returned instead."""
        flags: int = self.handle.run(phase, first_step)
        known = int(Flag.RUNNING) if phase is Phase.TRY_FIRST else unseen
        return known or self.read(flags)

    def read(self, flags: int) -> int:
        """The flags that a call of the handle returned, or those on the device, for which this waits."""
        if flags < 0:
            return int(Flag.RUNNING) if self._on_device else self.flags()[self.handle.turn]
        return flags

    def stay_on_device(self, condition: int = 0) -> None:
        """From now on nobody waits for flags: a loop on the device goes on as they say.

        The times of all steps' stages have one memory, and `run` returns RUNNING.

        Args:
            condition: the loop's; 0 while there is none yet.
        """
        self.handle.stay_on_device(condition)
        self._on_device = True

    @property
    def stage_times(self) -> Tensor:
        """[len(abscissae)] or, for more than one sample, [len(abscissae), B]: of the step to take; those of a trial."""
        return self.handle.stage_times  # type: ignore[no-any-return]


def interpolate(
    layout: Layout, interpolant: Interpolant, controller: Controller, y: Tensor, ks: list[Tensor], out: Tensor
) -> None:
    """Writes all outputs that the last step passed to their rows of `out`, [T, ...]."""
    _C.interpolate(layout.handle, interpolant, controller.handle, y, ks, out, layout.stride)


def finish_step(
    layout: Layout,
    interpolant: Interpolant,
    controller: Controller,
    y: Tensor,
    ks: list[Tensor],
    y1: Tensor,
    out: Tensor,
    stage: Tensor | None = None,
    weight: float = 0.0,
) -> None:
    """Writes all outputs that the last step passed; then, where it was accepted, y1 to y and ks[-1] to ks[0], in place.

    With a stage, y + dt weight ks[0] of the next step is written there. On CUDA alone.
    """
    _C.finish_step(layout.handle, interpolant, controller.handle, y, ks, y1, out, layout.stride, stage, weight)


def end_step(
    layout: Layout,
    table: Table,
    interpolant: Interpolant,
    controller: Controller,
    tolerances: tuple[float | Tensor, float | Tensor],
    y: Tensor,
    ks: list[Tensor],
    y1: Tensor,
    out: Tensor,
    stage: Tensor | None = None,
    weight: float = 0.0,
) -> None:
    """Controller.error_norm of the step just tried, Phase.JUDGE, and finish_step, in as few launches as can be.

    On CUDA alone.
    """
    _C.end_step(
        layout.handle, table, interpolant, controller.handle, *tolerances, y, ks, y1, out, layout.stride, stage, weight
    )


def interpolate_vjp(
    layout: Layout,
    interpolant: Interpolant,
    words: Tensor,
    times: Tensor,
    g: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
) -> list[Tensor | None]:
    """The transpose of `interpolate`, of the outputs which the step has passed of which words [N_FIELDS, B] tell.

    Returns, for every derivative, what gradients g [T, ...] of the outputs at the times [T] or [T, B] give to it; None
    where it has no weight in any. The sum of theirs is written to `start`, of one sample's at the step's end to `end`,
    and these give nothing to a derivative. On CUDA alone.
    """
    outs = [torch.empty_like(g[0]) if any(row) else None for row in interpolant.coefficients]
    _C.interpolate_vjp(
        layout.handle, interpolant, words, times, len(times), times.dim() == 2, g, layout.stride, outs, start, end
    )
    return outs


def repeat_while(layout: Layout, left: Tensor, condition: int) -> None:
    """Has a `GraphLoop` repeat its body where `left`, [1] int64, is not 0. On CUDA alone."""
    _C.repeat_while(layout.handle, left, condition)


def graph_loop() -> Any:
    """The compiled part of a `GraphLoop`.

    Raises:
        RuntimeError: the driver, or the CUDA of the build, has no such thing.
    """
    return _C.GraphLoop()
