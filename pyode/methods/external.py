"""Methods that other libraries carry out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScipySolver:
    """Any method of scipy.integrate.solve_ivp, named by the option solver."""

    name: str = "scipy_solver"
    order: int = 0  # that of the solver
    adaptive: bool = True
    one_step: bool = False
    source: str = "Virtanen et al., SciPy 1.0, 2020; scipy.integrate.solve_ivp"


scipy_solver = ScipySolver()
