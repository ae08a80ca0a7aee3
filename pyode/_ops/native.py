"""The ops, compiled. The only module that imports pyode._C.

A tensor handed to an op is contiguous, and of the layout's dtype and device.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from .. import _C
from . import contract
from .contract import INTEGER_FIELDS, N_FIELDS, REAL_FIELDS, Grid, Phase, Policy, RightHandSide, largest


class Interpolant(_C.Interpolant):
    """For each stage the coefficients of x, x^2, ... in its weight, and the weights at x = 1."""


_SCALARS = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.complex64: 0,
    torch.complex128: 1,
}


# For code that is compiled at run time: the addresses of functions, and what raises what the second has caught.
RUN_PARALLEL, INTERRUPTED, raise_interruption = _C.RUN_PARALLEL, _C.INTERRUPTED, _C.raise_interruption


def supports(y: Tensor) -> bool:
    """Whether the compiled ops can work on a tensor: a plain one, on a device and of a dtype that they know.

    Under torch.func's transforms and in forward-mode differentiation any tensor that func uses may be a wrapper, or
    carry a tangent: there the reference ops do the work.
    """
    return (
        type(y) in (Tensor, torch.nn.Parameter)
        and (y.device.type == "cpu" or (y.device.type == "cuda" and _C.CUDA is not None))
        and y.dtype in _SCALARS
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
    )


def build_info() -> dict[str, str | None]:
    """The compiler of the module, the SIMD level it runs at on this machine, the CUDA version it was built with."""
    return {"compiler": _C.COMPILER, "simd": _C.simd_level(), "cuda": _C.CUDA}


class Layout(contract.Layout):
    """A layout with its compiled counterpart."""

    def __init__(
        self, samples: int, size: int, segments: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(samples, size, segments, dtype, device)
        width = 2 if dtype.is_complex else 1
        offsets = [width * offset for offset in segments]
        cuda = device.type == "cuda"
        self.handle = _C.Layout(
            _SCALARS[dtype],
            dtype.is_complex,
            samples,
            width * size,
            offsets,
            torch.get_num_threads(),
            cuda,
            torch.cuda.current_stream(device).cuda_stream if cuda else 0,
            torch.tensor(offsets, device=device) if cuda else None,
            not torch.is_grad_enabled(),
        )
        big = not cuda and samples * size * dtype.itemsize >= _BIG
        self.spares: list[Tensor] | None = [] if big and _CAN_RECYCLE else None


_BIG = 1 << 20  # bytes; malloc gives smaller memory out again without a page fault
_MAX_SPARES = 4


def _owners(states: list[Tensor], i: int) -> tuple[int, ...]:
    """How many hold on to a state: in Python, in C++, and to its memory through another tensor."""
    storage = torch._C._storage_Use_Count(states[i].untyped_storage()._cdata)
    return sys.getrefcount(states[i]), states[i]._use_count(), storage  # type: ignore[attr-defined]


_CAN_RECYCLE = hasattr(Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")
_UNSHARED = _owners([torch.empty(0)], 0) if _CAN_RECYCLE else ()


def _new_state(layout: Layout, y: Tensor) -> Tensor:
    """Memory for a state. A big one that was given out before and that nobody else holds on to serves again."""
    spares = layout.spares
    if spares is None or torch.is_grad_enabled():
        return torch.empty_like(y)
    for i in range(len(spares)):
        if not spares[i].requires_grad and _owners(spares, i) == _UNSHARED:
            return spares[i]
    state = torch.empty_like(y)
    if len(spares) < _MAX_SPARES:
        spares.append(state)
    return state


def stage_combine(layout: Layout, weights: tuple[float, ...], y: Tensor, ks: list[Tensor], dt: Tensor) -> Tensor:
    """Returns y + dt sum_j w_j k_j; dt is [B] float64."""
    out = _new_state(layout, y)
    _C.stage_combine(layout.handle, weights, y, ks, dt, out)
    return out


def stages(
    layout: Layout,
    rows: tuple[tuple[float, ...], ...],
    y: Tensor,
    ks: list[Tensor],
    dt: Tensor,
    times: tuple[Tensor, ...],
    dynamics: RightHandSide,
) -> Tensor:
    """Evaluates a step's stages after the first: ks[j + 1] is the derivative at times[j] of row j's state.

    Returns the last state. func is called from the compiled loop: with an empty func a tenth less
    of a solve than from a loop in Python.
    """
    allocate = torch.empty_like if layout.spares is None else partial(_new_state, layout)
    direct = dynamics.direct
    if direct is not None:
        dynamics.count(len(times))
    return _C.stages(layout.handle, rows, y, ks, dt, times, dynamics, allocate, direct)  # type: ignore[no-any-return]


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


@lru_cache(maxsize=64)
def _like(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor to make others like, which is faster than to name shape, dtype and device; never written or read."""
    return torch.empty(shape, dtype=dtype, device=device)


class Controller:
    """The step-size controller of all samples, and the norms it judges by.

    Args:
        layouts: of the state, and of further quantities that have a share in the norm.
        policy, grid: see there.
        abscissae: of the stages whose times are wanted, relative to the step.

    Attributes:
        dt: [B] float64, the step to take, signed; 0 for a sample that stands still.
        stage_times: [len(abscissae)] or, for more than one sample, [len(abscissae), B]: of the step to take.
    """

    def __init__(self, layouts: list[Layout], policy: Policy, grid: Grid, abscissae: tuple[float, ...]) -> None:
        state = layouts[0]
        B, device = state.samples, state.device
        self.layouts = layouts
        self._grid = grid  # keeps the memory that the handle points to
        parts = max(layout.handle.error_parts for layout in layouts)
        slots = sum(layout.n_segments for layout in layouts)
        self._slot = 8 * parts * B  # bytes of means for one segment
        self._n_segments, self._parts = slots, parts
        # One allocation: the rows of the state's words, two of flags, the means of a first step or of any other. Long
        # rows begin an odd number of cache lines apart, for a power of two has them all in the same few places.
        self._stride = stride = B if B < 64 else 8 * (-(-B // 8) | 1)
        self._flags = N_FIELDS * stride
        words = torch.zeros(self._flags + 2 + 2 * slots * parts * B, dtype=torch.float64, device=device)
        self._words = words
        base = words.data_ptr()
        self._means = base + 8 * (self._flags + 2)
        self.dt = words[stride : stride + B]
        shape = (len(abscissae),) if B == 1 else (len(abscissae), B)
        self._template = _like(shape, state.real_dtype, device)
        self._trial_template = _like(shape[1:], state.real_dtype, device)
        self.stage_times = self._template
        self.handle = handle = _C.Controller(
            state.handle, _SCALARS[state.real_dtype], words, stride, base + 8 * self._flags, abscissae
        )
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
        handle.set_norm(self._means, slots, parts)

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
        _C.error_norm(handle, weights, y0, y1, ks, dt, rtol, atol, self._means + slot * self._slot, self._parts)

    def put_norm(self, norm: Tensor | float, slot: int = 0) -> None:
        """Notes a norm that someone else has computed: a number, or for several samples [B]."""
        B = self.layouts[0].samples
        i = self._flags + 2 + slot * self._slot // 8
        self._words[i : i + B] = norm * norm

    def run(self, phase: Phase, first_step: float = 0.0) -> int:
        """Carries out a phase for all samples; returns the flags. On CUDA this waits for the device."""
        times = torch.empty_like(self._trial_template if phase is Phase.TRY_FIRST else self._template)
        self.stage_times = times
        flags: int = self.handle.run(phase, times, first_step)
        if flags < 0 and phase is not Phase.TRY_FIRST:
            flags = self._words[self._flags : self._flags + 2].view(torch.int64).tolist()[self.handle.turn]
        return flags

    def finish(self, which: Tensor, status: int) -> None:
        """Ends the solve of some samples: `which` is [B] bool."""
        which = which.to(self._words.device)
        self.field("status").masked_fill_(which, status)
        self.dt.masked_fill_(which, 0.0)

    def field(self, name: str) -> Tensor:
        """A field of the step state, [B]: a view."""
        start = (REAL_FIELDS + INTEGER_FIELDS).index(name) * self._stride
        row = self._words[start : start + self.layouts[0].samples]
        return row if name in REAL_FIELDS else row.view(torch.int64)


def interpolate(
    layout: Layout, interpolant: Interpolant, controller: Controller, y: Tensor, ks: list[Tensor], out: Tensor
) -> None:
    """Writes all outputs that the last step passed to their rows of `out`, [T, ...]."""
    stride = layout.samples * layout.size * (2 if layout.dtype.is_complex else 1)
    _C.interpolate(layout.handle, interpolant, controller.handle, y, ks, out, stride)
