"""The methods and their registry. A method is data; a new explicit one is one table, added here.

The loops that carry out the kinds of methods are in `stepping/`.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Protocol

from ..errors import InvalidValue
from .adams import variable_adams
from .dormand_prince import dopri5, dopri8
from .external import scipy_solver
from .implicit import (
    ImplicitTableau,
    gl4,
    gl6,
    implicit_euler,
    implicit_midpoint,
    radau_iia3,
    radau_iia5,
    sdirk2,
    trapezoid,
    trbdf2,
)
from .low_order import adaptive_heun, bosh3, euler, fehlberg2, heun2, heun3, midpoint, rk4
from .multistep import explicit_adams, implicit_adams
from .tableau import Tableau
from .tsitouras import tsit5


class Method(Protocol):
    """What all kinds of methods have.

    Attributes:
        name: what users call it.
        order: of the solution; the highest, where it varies.
        adaptive: whether it chooses its steps.
        one_step: whether a step is a weighted sum of its own evaluations, and of no earlier ones.
        options: those that only methods of this kind know.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def order(self) -> int: ...  # noqa: D102
    @property
    def adaptive(self) -> bool: ...  # noqa: D102
    @property
    def one_step(self) -> bool: ...  # noqa: D102
    @property
    def options(self) -> frozenset[str]: ...  # noqa: D102


TABLEAUS: dict[str, Tableau] = {
    tableau.name: tableau
    for tableau in (
        dopri8, dopri5, tsit5, bosh3, fehlberg2, adaptive_heun,
        euler, midpoint, heun2, heun3, rk4,
    )
}  # fmt: skip
IMPLICIT: dict[str, ImplicitTableau] = {
    tableau.name: tableau
    for tableau in (
        implicit_euler, implicit_midpoint, trapezoid, radau_iia3, gl4, radau_iia5, gl6, sdirk2, trbdf2,
    )
}  # fmt: skip
METHODS: dict[str, Method] = {
    **TABLEAUS,
    **IMPLICIT,
    "adams": variable_adams,
    "explicit_adams": explicit_adams,
    "implicit_adams": implicit_adams,
    "fixed_adams": replace(implicit_adams, name="fixed_adams"),  # its old name
    "scipy_solver": scipy_solver,
}
DEFAULT = dopri5.name
# What torchdiffeq calls their solvers in a warning, which programs may filter by its beginning.
NAMES_IN_WARNINGS = {
    "dopri8": "Dopri8Solver", "dopri5": "Dopri5Solver", "tsit5": "Tsit5Solver", "bosh3": "Bosh3Solver",
    "fehlberg2": "Fehlberg2", "adaptive_heun": "AdaptiveHeunSolver", "euler": "Euler", "midpoint": "Midpoint",
    "heun2": "Heun2", "heun3": "Heun3", "rk4": "RK4", "explicit_adams": "AdamsBashforth",
    "implicit_adams": "AdamsBashforthMoulton", "fixed_adams": "AdamsBashforthMoulton",
    "scipy_solver": "ScipyWrapperODESolver",
}  # fmt: skip


def find(name: str | None, argument: str = "method") -> Method:
    """The method of this name; the default one for None. `argument` is what an error calls it.

    Raises:
        InvalidValue: a ValueError that names the closest method, if there is none of this name.
    """
    if name is None:
        name = DEFAULT
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    close = difflib.get_close_matches(str(name), METHODS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InvalidValue(f"{argument} must be one of {', '.join(METHODS)}, not {name!r}{hint}")


__all__ = [
    "DEFAULT",
    "IMPLICIT",
    "METHODS",
    "NAMES_IN_WARNINGS",
    "TABLEAUS",
    "ImplicitTableau",
    "Method",
    "Tableau",
    "find",
]
