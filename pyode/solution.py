"""What a solve tells about itself."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class Stats:
    """Counts of one or several solves.

    Give one to a solve as `options={"stats": stats}`; it adds its counts when it ends, also when it ends with an error.

    Attributes:
        n_f_evals: evaluations of func.
        n_accepted: steps that were accurate enough.
        n_rejected: steps that were not, and were tried again with a smaller size.
        n_newton: iterations of Newton's method, of all stages of implicit methods; each evaluates func at one stage, or
            at all stages that are solved for together.
        n_krylov: iterations of GMRES in them, for large states: each is a product with the Jacobian, a derivative of an
            evaluation that was made, and counts as none.
    """

    n_f_evals: int = 0
    n_accepted: int = 0
    n_rejected: int = 0
    n_newton: int = 0
    n_krylov: int = 0

    @property
    def n_steps(self) -> int:
        """All steps, accepted and rejected."""
        return self.n_accepted + self.n_rejected

    def __add__(self, other: Stats) -> Stats:
        """The sum of both."""
        return Stats(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def add(self, other: Stats) -> None:
        """Adds the other's counts to these."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
