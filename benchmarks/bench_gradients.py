"""Work-precision of gradients: how far a training step's gradient is off, and what it costs, over tolerances."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

import pyode

from .bench_training import exact_gradient, relative_error
from .cases import Case, cases
from .timing import Contender, interleaved, processor_seconds_of, seconds_of

TITLE = "The gradient's error (relative, against float64 at 1e-10) and time, over tolerances (dopri5, float32)"
COLUMNS = {
    "case": "case",
    "rtol": "rtol",
    "solver": "solver and gradient",
    "ms": "[ms]",
    "error": "error",
    "rounding": "against backpropagation through the same steps in float64",
}
CASES = ("spiral20x2", "big256x64")
RTOLS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
SOLVERS: dict[str, Callable[..., Tensor]] = {
    "pyode, direct": pyode.odeint,
    "pyode, checkpoint": partial(pyode.odeint, options={"gradient": "checkpoint"}),
    "pyode, adjoint": pyode.odeint_adjoint,
    "torchdiffeq, direct": torchdiffeq.odeint,
    "torchdiffeq, adjoint": torchdiffeq.odeint_adjoint,
}


def through_the_same_steps(case: Case, **tolerances: float) -> Tensor:
    """The gradient by backpropagation in float64 through the steps that the solve in float32 takes."""
    ends: list[Tensor] = []

    class Noting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = case.f

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.f(t, y)  # type: ignore[no-any-return]

        def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
            ends.append(t0 + dt)

    with torch.no_grad():
        pyode.odeint(Noting(), case.y0, case.t, **tolerances)
    # Tolerances that accept every step, and steps that end where those did.
    options = {"step_t": torch.stack(ends), "first_step": 1e3, "min_step": 1e-12}
    return case.to(torch.float64).gradient(pyode.odeint, rtol=1e12, atol=1e12, options=options)


def measure(seconds: float = 20.0, clock: Callable[[Contender], float] = seconds_of) -> list[dict[str, Any]]:
    """A row for each case, tolerance and solver."""
    rows = []
    for name in CASES:
        case = cases()[name]
        exact = exact_gradient(case)
        for rtol in RTOLS:
            tolerances = {"rtol": rtol, "atol": rtol / 100}
            contenders: dict[str, Contender] = {
                solver: partial(case.gradient, solve, **tolerances) for solver, solve in SOLVERS.items()
            }
            same_steps = through_the_same_steps(case, **tolerances)
            for solver, time in interleaved(contenders, seconds=seconds / len(RTOLS), clock=clock).items():
                gradient = contenders[solver]()
                rows.append(
                    {
                        "case": name,
                        "rtol": rtol,
                        "solver": solver,
                        "ms": 1e3 * time,
                        "error": relative_error(gradient, exact),
                        "rounding": relative_error(gradient, same_steps),
                    }
                )
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The picture: error against time, a line for each solver."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(CASES), figsize=(10, 4), constrained_layout=True)
    for axis, name in zip(axes, CASES):
        for solver in SOLVERS:
            points = [row for row in rows if row["case"] == name and row["solver"] == solver]
            style = "--" if solver.startswith("torchdiffeq") else "-"
            axis.loglog([p["error"] for p in points], [p["ms"] for p in points], style, marker="o", label=solver)
        axis.set(title=name, xlabel="error of the parameters' gradient", ylabel="forward and backward, one thread [ms]")
        axis.invert_xaxis()
    axes[0].legend()
    figure.savefig(path)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Draw the work-precision picture of gradients.")
    parser.add_argument("path", type=Path, nargs="?", default=Path("docs/gradients.svg"))
    parser.add_argument("--seconds", type=float, default=20.0, help="for each case (default: 20)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    draw(measure(chosen.seconds, processor_seconds_of), chosen.path)
