"""The methods and their registry. A new explicit method is one table, added here."""

from __future__ import annotations

import difflib

from ..errors import InvalidValue
from .dormand_prince import dopri5, dopri8
from .low_order import adaptive_heun, bosh3, euler, fehlberg2, heun2, heun3, midpoint, rk4
from .tableau import Tableau
from .tsitouras import tsit5

TABLEAUS: dict[str, Tableau] = {
    tableau.name: tableau
    for tableau in (
        dopri8, dopri5, tsit5, bosh3, fehlberg2, adaptive_heun,
        euler, midpoint, heun2, heun3, rk4,
    )
}  # fmt: skip
DEFAULT = dopri5.name


def find(name: str | None, argument: str = "method") -> Tableau:
    """The method of this name; the default one for None. `argument` is what an error calls it.

    Raises:
        InvalidValue: a ValueError that names the closest method, if there is none of this name.
    """
    if name is None:
        name = DEFAULT
    if isinstance(name, str) and name in TABLEAUS:
        return TABLEAUS[name]
    close = difflib.get_close_matches(str(name), TABLEAUS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InvalidValue(f"{argument} must be one of {', '.join(TABLEAUS)}, not {name!r}{hint}")


__all__ = ["DEFAULT", "TABLEAUS", "Tableau", "find"]
