"""The loop over a given grid of times, for methods without an error estimate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._ops import autograd, backend_of, reference
from .._ops.contract import Layout, RightHandSide
from ..control import Times, number_from
from ..errors import InvalidType, InvalidValue
from ..methods import Tableau
from ..solution import Stats
from .adaptive import interpolant_of
from .quadrature import Quadrature

INTERPOLATIONS = ("linear", "cubic")


def check_interp(options: dict[str, Any]) -> None:
    """Raises InvalidValue for an unknown interpolation."""
    interp = options.get("interp", "linear")
    if interp not in INTERPOLATIONS:
        raise InvalidValue(f"options['interp'] must be one of {', '.join(INTERPOLATIONS)}, not {interp!r}")


def grid_of(options: dict[str, Any], times: Times, func: Callable[..., Any], y0: Any) -> Tensor:
    """The times at which steps begin and end, 1-D, as the options step_size or grid_constructor have it.

    Raises:
        InvalidType, InvalidValue: an option is wrong, or the grid does not begin and end where t does.
    """
    t = times.tensor
    step_size, constructor = options.get("step_size"), options.get("grid_constructor")
    if step_size is not None and constructor is not None:
        raise InvalidValue("step_size and grid_constructor are mutually exclusive arguments")
    if constructor is not None:
        grid = constructor(func, y0, t)
        if not isinstance(grid, Tensor) or grid.dim() != 1:
            raise InvalidType("options['grid_constructor'] must return a 1-D tensor of times")
        ends = grid.detach().double().tolist()[:: max(len(grid) - 1, 1)]
        if ends != [times.values[0], times.values[-1]]:
            raise InvalidValue(f"options['grid_constructor'] must return times from t[0] to t[-1]; it returned {grid}")
        return grid
    if step_size is None or len(t) == 1:
        return t
    size = number_from(options, "step_size", 0.0, -math.inf)
    if not 0 < size < math.inf:
        raise InvalidValue(f"options['step_size'] must be positive and finite, not {step_size!r}")
    # As torchdiffeq counts: the last step is the shorter one.
    n = int(torch.ceil((t[-1] - t[0]).detach().abs() / size + 1).item())
    steps = torch.arange(n, dtype=t.dtype, device=t.device) * (times.sign * size)
    return torch.cat([(steps + t[0])[:-1], t[-1:]])


class FixedGridLoop:
    """A solve with the steps of a given grid.

    Args:
        dynamics, tableau, layout, times, quadrature: as AdaptiveLoop's.
        grid: [N] times of the steps' ends.
        interp: "linear" or "cubic", between the grid's times.
        perturb: whether func sees a step's start just behind it and its end just before it.
    """

    def __init__(
        self,
        dynamics: RightHandSide,
        tableau: Tableau,
        layout: Layout,
        times: Times,
        grid: Tensor,
        interp: str = "linear",
        perturb: bool = False,
        quadrature: Quadrature | None = None,
    ) -> None:
        self.dynamics, self.tableau, self.layout, self.times = dynamics, tableau, layout, times
        self.grid, self.cubic, self.perturb, self.quadrature = grid, interp == "cubic", perturb, quadrature
        self.ops = backend_of(layout)
        self.n_steps = 0
        self.last_step = None

    def solve(self, y0: Tensor, first_step: float | None = None) -> Tensor:
        """Returns the states at the output times, [T, *y0.shape]."""
        recording = torch.is_grad_enabled()
        # Where times carry a gradient, so do step sizes and positions between: the twin does the work.
        moving = recording and (self.grid.requires_grad or self.times.tensor.requires_grad)
        ends, sizes, stage_times = self._schedule(y0, moving)
        rows, dynamics, quadrature = self.tableau.rows, self.dynamics, self.quadrature
        if recording:
            combine = partial(autograd.stage_combine, self.ops, self.layout)
            stages = partial(autograd.stages, self.ops, self.layout)
        else:
            combine = partial(self.ops.stage_combine, self.layout)
            stages = partial(self.ops.stages, self.layout)
        outputs = Outputs(self, y0, recording)
        values, sign, i, y = self.times.values, self.times.sign, 1, y0
        for n, dt in enumerate(sizes):
            first, *times = stage_times[n].unbind()
            ks = [dynamics(first, y)] * (len(rows) + 1)
            if rows:
                stages(rows, y, ks, dt, tuple(times), dynamics)
            y1 = combine(self.tableau.weights, y, ks, dt)
            self.n_steps += 1
            if quadrature is not None:
                quadrature.finish_fixed_step(dt)
            while i < len(values) and sign * (values[i] - ends[n + 1]) <= 0:
                at_end = values[i] == ends[n + 1] and not moving
                outputs.add(y1 if at_end else self._between(i, n, ends, y, y1, ks, dt, moving, combine))
                i += 1
            y = y1
        return outputs.collect()

    def add_to(self, stats: Stats | None, evals_before: int = 0) -> None:
        """Adds the solve's counts."""
        if stats is not None:
            stats.n_f_evals += self.dynamics.n_evals - evals_before
            stats.n_accepted += self.n_steps

    def _schedule(self, y0: Tensor, moving: bool) -> tuple[list[float], Sequence[Tensor], Tensor]:
        """Grid times on the host, step sizes [N - 1] float64, and the times of all stages, [N - 1, stages]."""
        grid = self.grid if moving else self.grid.detach()
        grid = grid.to(y0.device, torch.float64)
        sizes = grid[1:] - grid[:-1]
        abscissae = torch.tensor((0.0, *self.tableau.abscissae), dtype=torch.float64, device=y0.device)
        times = grid[:-1, None] + abscissae * sizes[:, None]
        last = abscissae == 1
        times = torch.where(last, grid[1:, None], times).to(self.layout.real_dtype)
        if self.perturb:
            ahead = torch.nextafter(times, times + self.times.sign).detach()
            behind = torch.nextafter(times, times - self.times.sign).detach()
            exact = times
            times = torch.where(last, behind, torch.where(abscissae == 0, ahead, times.detach()))
            times = times + (exact - exact.detach())
        return grid.tolist(), sizes.unsqueeze(1).unbind() if len(sizes) else (), times

    def _between(
        self,
        i: int,
        n: int,
        ends: list[float],
        y: Tensor,
        y1: Tensor,
        ks: list[Tensor],
        dt: Tensor,
        moving: bool,
        combine: Callable[..., Tensor],
    ) -> Tensor:
        """The state at output time i, which step n has passed."""
        x: Any = (self.times.values[i] - ends[n]) / (ends[n + 1] - ends[n])
        if moving:
            grid, t = self.grid, self.times.tensor
            x = ((t[i] - grid[n]) / (grid[n + 1] - grid[n])).to(device=y.device, dtype=self.layout.real_dtype)
        if not self.cubic:
            if moving:
                between: Tensor = y + x * (y1 - y)
                return between
            return combine(tuple(w * x for w in self.tableau.weights), y, ks, dt)
        t1 = (self.grid if moving else self.grid.detach())[n + 1].to(device=y.device, dtype=self.layout.real_dtype)
        ks = [*ks, self.dynamics(t1, y1)]
        polynomial = interpolant_of(reference, self.tableau)
        if moving:
            return reference.interpolate_at(polynomial, x, y, ks, dt.to(y.real.dtype if y.is_complex() else y.dtype))
        return combine(polynomial.weights_at(x), y, ks, dt)


class Outputs:
    """The states at the output times: copied to their place, or with a graph behind them, kept until the end."""

    def __init__(self, loop: FixedGridLoop, y0: Tensor, recording: bool) -> None:
        self.loop = loop
        self.states = [y0]
        shape = (len(loop.times.values), *y0.shape)
        self.out = None if recording else torch.empty(shape, dtype=y0.dtype, device=y0.device)
        self.places = iter(() if self.out is None else self.out.unbind())
        if self.out is not None:
            self.add(y0)

    def add(self, y: Tensor) -> None:
        """Adds the next one."""
        if self.out is None:
            self.states.append(y)
        else:
            self.loop.ops.copy(self.loop.layout, y, next(self.places))

    def collect(self) -> Tensor:
        """All of them, [T, ...]."""
        return torch.stack(self.states) if self.out is None else self.out
