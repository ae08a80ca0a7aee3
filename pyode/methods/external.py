"""Methods that other libraries carry out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class ScipySolver:
    """Any method of scipy.integrate.solve_ivp; the option solver names it, "LSODA" by default."""

    name: str = "scipy_solver"
    order: int = 0  # the solver's
    adaptive: bool = True
    one_step: bool = False
    options: frozenset[str] = frozenset(["solver", "first_step", "min_step", "max_step", "norm"])
    source: str = "scipy.integrate.solve_ivp; Virtanen et al., SciPy 1.0, 2020"


scipy_solver = ScipySolver()
