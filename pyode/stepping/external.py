"""A solve by SciPy, behind the interface of our own loops."""

from __future__ import annotations

import inspect
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
    """A solve by scipy.integrate.solve_ivp, in NumPy arrays on the host, without gradients.

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
        self.solve_ivp, self.solver = scipy.solve_ivp, solver
        tolerances = {"rtol": rtol, "atol": atol}
        self.arguments = {name: self._on_host(value) for name, value in tolerances.items()}
        # Not every method of SciPy has both bounds, and where it lacks one it warns.
        taken = inspect.signature(getattr(scipy, solver).__init__).parameters
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

        def func(t: float, y: Any) -> Any:
            time = torch.tensor(t, dtype=self.layout.real_dtype, device=y0.device)
            k = self.dynamics(time, torch.tensor(y).to(y0).view(y0.shape))
            if self.dynamics.n_evals == evals_before + 1 and not k.isfinite().all():
                raise lost  # SciPy would look for a first step forever
            return _array(k)

        values, evals_before = self.times.values, self.dynamics.n_evals
        lost = SolveError(Status.NON_FINITE, values[0], 0.0, 0)
        try:
            with torch.no_grad():
                result = self.solve_ivp(
                    func, (values[0], values[-1]), _array(y0), self.solver, values, first_step=first_step,
                    **self.arguments,
                )  # fmt: skip
        except SolveError as error:
            if error is not lost:
                raise
            self.hooks.fail(error)
            return y0.expand(len(values), *y0.shape).clone()
        states = torch.as_tensor(result.y.T).to(y0).reshape(-1, *y0.shape)
        missing = len(values) - len(states)
        if result.status != 0 or missing:
            reached = values[max(len(states) - 1, 0)]
            status = Status.STEP_TOO_SMALL if np.isfinite(result.y).all() else Status.NON_FINITE
            self.hooks.fail(SolveError(status, reached, 0.0, len(result.t)))
            last = states[-1:] if len(states) else y0[None]
            states = torch.cat([states, last.expand(missing, *y0.shape)])
        return states

    def add_to(self, stats: Stats | None, evals_before: int = 0) -> None:
        """Adds the evaluations; SciPy does not tell the steps."""
        if stats is not None:
            stats.n_f_evals += self.dynamics.n_evals - evals_before


def _array(y: Tensor) -> Any:
    """A flat array in double precision, which SciPy computes in."""
    wide = torch.complex128 if y.is_complex() else torch.float64
    return y.detach().reshape(-1).to("cpu", wide).numpy()
