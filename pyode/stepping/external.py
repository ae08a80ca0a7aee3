"""A solve by one of SciPy's solvers, behind the interface of our own loops."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._ops.contract import Layout, Policy, RightHandSide
from ..control import Times
from ..errors import InvalidValue, SolveError, Status
from ..solution import Stats
from .hooks import Hooks


class ScipyLoop:
    """A solve as scipy.integrate.solve_ivp carries it out, in NumPy arrays on the host, without gradients.

    The steps are taken here, one by one, because solve_ivp loses all of them where one ends with an exception.

    Args:
        dynamics, layout, times, rtol, atol, policy, hooks: as AdaptiveLoop's.
        solver: the name of a method of solve_ivp, as "LSODA" or "Radau".

    Raises:
        InvalidValue: there is no such solver, or it does not do complex states, or SciPy is not installed.
    """

    last_step = None

    def __init__(
        self,
        dynamics: RightHandSide,
        layout: Layout,
        times: Times,
        rtol: float | Tensor,
        atol: float | Tensor,
        policy: Policy,
        solver: str,
        hooks: Hooks,
    ) -> None:
        try:
            import scipy.integrate as scipy
        except ImportError as error:
            raise InvalidValue("method 'scipy_solver' needs SciPy: pip install scipy") from error
        known = [name for name in ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA") if hasattr(scipy, name)]
        if solver not in known:
            raise InvalidValue(f"options['solver'] must be one of {', '.join(known)}, not {solver!r}")
        if solver in ("Radau", "LSODA") and layout.dtype.is_complex:
            raise InvalidValue(f"SciPy's {solver} does not solve complex states; choose options={{'solver': 'DOP853'}}")
        if hooks.watch is not None:
            raise InvalidValue("method 'scipy_solver' finds no events and has no dense output; choose another method")
        self.dynamics, self.layout, self.times, self.hooks = dynamics, layout, times, hooks
        self.solver = getattr(scipy, solver)
        self.n_accepted, self._finite = 0, True
        tolerances = {"rtol": rtol, "atol": atol}
        self.arguments = {name: self._on_host(value) for name, value in tolerances.items()}
        # Not every method of SciPy has both bounds, and where it lacks one it warns.
        taken = inspect.signature(self.solver.__init__).parameters
        bounds = {"min_step": policy.min_step, "max_step": policy.max_step}
        self.arguments |= {name: value for name, value in bounds.items() if name in taken}

    def _on_host(self, tolerance: float | Tensor) -> Any:
        if not isinstance(tolerance, Tensor):
            return tolerance
        if self.layout.dtype.is_complex:
            tolerance = tolerance[..., 0]
        return tolerance.reshape(-1).cpu().numpy()

    def solve(self, y0: Tensor, first_step: float | None = None) -> Tensor:
        """Returns the states at the output times, [T, *y0.shape]."""
        values, sign = self.times.values, self.times.sign
        if y0.numel() == 0 or len(values) == 1:  # nothing to solve, which SciPy counts as a step
            return y0.expand(len(values), *y0.shape).clone()
        t, y = values[0], _array(y0)
        self._finite = bool(np.isfinite(y).all())
        outputs: list[Any] = []
        with torch.no_grad():
            for solver in self._steps(y0, first_step):
                if not np.isfinite(solver.y).all():  # LSODA goes on from nan to nan
                    self._finite = False
                    break
                t, y = float(solver.t), solver.y
                self.n_accepted += 1
                begin = len(outputs)
                end = begin + sum(sign * (value - t) <= 0 for value in values[begin:])
                if end > begin:
                    outputs.extend(solver.dense_output()(np.array(values[begin:end])).T)
        if len(outputs) < len(values):
            status = Status.STEP_TOO_SMALL if self._finite else Status.NON_FINITE
            self.hooks.fail(SolveError(status, t, 0.0, self.n_accepted))
            outputs.extend([y] * (len(values) - len(outputs)))
        return torch.as_tensor(np.stack(outputs), device="cpu").to(y0).reshape(-1, *y0.shape)

    def _steps(self, y0: Tensor, first_step: float | None) -> Iterator[Any]:
        """SciPy's solver after each step that it has taken, up to the end or a failure."""

        def func(t: float, y: Any) -> Any:
            self._finite = True  # an exception that func raises is its own
            time = torch.tensor(t, dtype=self.layout.real_dtype, device=y0.device)
            k = _array(self.dynamics(time, torch.tensor(y, device="cpu").to(y0).view(y0.shape)))
            self._finite = bool(np.isfinite(k).all())
            if not (self._finite or begun):
                raise FloatingPointError  # SciPy would look for a first step forever
            begun.append(True)
            return k

        begun: list[bool] = []
        values = self.times.values
        try:
            solver = self.solver(func, values[0], _array(y0), values[-1], first_step=first_step, **self.arguments)
            while solver.status == "running":
                solver.step()
                if solver.status != "failed":
                    yield solver
        except (FloatingPointError, ValueError):  # SciPy's linear algebra refuses nan
            if self._finite:
                raise

    def add_to(self, stats: Stats | None, evals_before: int = 0) -> None:
        """Adds the evaluations and the steps; SciPy does not tell those that it rejected."""
        if stats is not None:
            stats.n_f_evals += self.dynamics.n_evals - evals_before
            stats.n_accepted += self.n_accepted


def _array(y: Tensor) -> Any:
    """A flat array in double precision, which SciPy computes in."""
    wide = torch.complex128 if y.is_complex() else torch.float64
    return y.detach().reshape(-1).to("cpu", wide).numpy()
