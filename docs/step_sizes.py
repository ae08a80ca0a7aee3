"""Draws docs/step_sizes.png: the step sizes of van der Pol oscillators, each with its own and all with one."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import pyode

MU = torch.tensor([1.0, 5.0, 15.0], dtype=torch.float64)
COLOURS = ("#0072b2", "#d55e00", "#009e73")
T = torch.tensor([0.0, 20.0], dtype=torch.float64)
PICTURE = Path(__file__).with_suffix(".png")


def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    """Each row with its own mu, the last number."""
    x, v, mu = y.unbind(-1)
    return torch.stack([v, mu * (1 - x * x) * v - x, 0 * mu], -1)


def steps_of(control: str) -> tuple[pyode.Solution, list[tuple[Tensor, Tensor]]]:
    """The solution, and for each controller the times and sizes of its accepted steps."""
    y0 = torch.stack([torch.full_like(MU, 2.0), torch.zeros_like(MU), MU], -1)
    solution = pyode.solve_ivp(van_der_pol, y0, T, rtol=1e-5, atol=1e-7, control=control, dense_output=True)
    dense, taken = solution.interpolant, []
    for b in range(len(solution.status)):
        moved = dense.t1[:, b].diff(prepend=T[:1]) != 0  # others were rejected, or the sample was done
        taken.append((dense.t0[moved, b], (dense.t1 - dense.t0)[moved, b]))
    return solution, taken


def main() -> None:
    """Draws the picture."""
    (each, own), (_, one) = steps_of("per_sample"), steps_of("joint")
    times = torch.linspace(0, 20, 1000, dtype=torch.float64)
    states = each.interpolant(times)
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (above, below) = plt.subplots(2, 1, figsize=(7.5, 5), sharex=True, layout="constrained")
    for b, (mu, colour) in enumerate(zip(MU.tolist(), COLOURS)):
        above.plot(times, states[:, b, 0], color=colour, lw=1.4, label=f"$\\mu$ = {mu:g}")
        below.plot(*own[b], color=colour, lw=1.0, drawstyle="steps-post", label=f"{len(own[b][0])} steps")
    below.plot(
        *one[0], color="black", lw=1.0, alpha=0.7, drawstyle="steps-post", label=f"joint: {len(one[0][0])} steps"
    )
    above.set_ylabel("x")
    figure.suptitle("Three van der Pol oscillators in one batch")
    below.set(xlabel="t", ylabel="step size", yscale="log")
    for axes in (above, below):
        axes.legend(ncol=4, loc="upper center", bbox_to_anchor=(0.5, 1.12), frameon=False)
    above.set_ylim(-2.6, 3.2)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
