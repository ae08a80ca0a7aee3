"""python -m pyode demo: trains a neural ODE on a cubic spiral, draws it, and says what it took.

The example is that of Chen, Rubanova, Bettencourt, Duvenaud, Neural Ordinary Differential Equations (2018), as in
torchdiffeq's ode_demo.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from .. import Stats, backend, methods, odeint, odeint_adjoint
from .picture import draw, obstacle

MATRIX = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
START = torch.tensor([2.0, 0.0])
TIMES = torch.linspace(0.0, 25.0, 1000)
PIECES, PIECE_LENGTH = 20, 10  # of a mini-batch: so many pieces of the trajectory, each of so many times
LEARNING_RATE = 1e-3
LOSSES_AVERAGED = 50  # in the final loss


def add_to(commands: Any) -> None:
    """Adds the command to the parser's."""
    parser = commands.add_parser(
        "demo",
        help="train a neural ODE on a spiral, draw the result, compare with the pure-Python solver",
        description="Fits a network to a trajectory of dy/dt = y**3 A with odeint_adjoint, draws data and fit to a "
        "PNG, and prints what the training took, beside the pure-Python solver.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=_positive, default=1000, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the mini-batches")
    parser.add_argument("--method", choices=list(methods.TABLEAUS), default=methods.DEFAULT, help="of the solver")
    parser.add_argument("--rtol", type=float, default=1e-5, help="relative tolerance")
    parser.add_argument("--atol", type=float, default=1e-7, help="absolute tolerance")
    parser.add_argument("--threads", type=_positive, default=1, help="of torch; the network is too small for more")
    parser.add_argument("--output", type=Path, default=Path("pyode-demo.png"), help="where the picture goes")
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text}")
    return int(text)


class Network(nn.Module):
    """dy/dt as a 2-50-2 tanh network of y**3."""

    def __init__(self) -> None:
        super().__init__()
        first, last = nn.Linear(2, 50), nn.Linear(50, 2)
        self.net = nn.Sequential(first, nn.Tanh(), last)
        # y**3 goes from -8 to 8: with small weights tanh begins where it is nearly linear.
        for layer, spread in ((first, 0.01), (last, 1.0)):
            nn.init.normal_(layer.weight, std=spread)
            nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """[..., 2] to [..., 2]."""
        derivative: Tensor = self.net(y**3)
        return derivative


def true_dynamics(t: Tensor, y: Tensor) -> Tensor:
    """dy/dt = y**3 A."""
    return y**3 @ MATRIX.to(y)


@dataclass
class Training:
    """A training under way.

    Args:
        data: [1000, 2], the trajectory at TIMES.
        seed: of the weights and the mini-batches.
        solver: method and tolerances, as odeint takes them.
        n_steps: over which the learning rate falls to 0.
    """

    data: Tensor
    seed: int
    solver: dict[str, Any]
    n_steps: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each step
    forward: Stats = field(default_factory=Stats)
    backward: Stats = field(default_factory=Stats)

    def __post_init__(self) -> None:
        """Makes the network, its optimizer, and the source of mini-batches."""
        torch.manual_seed(self.seed)
        self.network = Network()
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=LEARNING_RATE)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.n_steps)
        self.generator = torch.Generator().manual_seed(self.seed)

    def step(self) -> float:
        """Takes one training step; returns its loss, the mean of |y - data| over a mini-batch."""
        began = time.perf_counter()
        starts = torch.randperm(len(TIMES) - PIECE_LENGTH, generator=self.generator)[:PIECES]
        pieces = torch.stack([self.data[starts + i] for i in range(PIECE_LENGTH)])
        self.optimizer.zero_grad()
        fit = odeint_adjoint(
            self.network,
            pieces[0],
            TIMES[:PIECE_LENGTH],
            **self.solver,
            options={"stats": self.forward},
            adjoint_options={"stats": self.backward},
        )
        loss = (fit - pieces).abs().mean()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - began)
        return self.losses[-1]

    def fit(self) -> Tensor:
        """The network's own trajectory from the data's start, [1000, 2]."""
        with torch.no_grad():
            trajectory: Tensor = odeint(self.network, self.data[0], TIMES, **self.solver)
        return trajectory

    @property
    def final_loss(self) -> float:
        """The mean of the last losses."""
        return mean(self.losses[-LOSSES_AVERAGED:])


def train(data: Tensor, chosen: argparse.Namespace, name: str, steps: int, reference: bool = False) -> Training:
    """The first `steps` of the training, with a progress bar."""
    from tqdm import trange  # type: ignore[import-untyped, unused-ignore]

    solver = {"method": chosen.method, "rtol": chosen.rtol, "atol": chosen.atol}
    training = Training(data, chosen.seed, solver, chosen.steps)
    with backend("reference") if reference else nullcontext(), trange(steps, desc=name, unit="step") as bar:
        for _ in bar:
            loss = training.step()
            bar.set_postfix(loss=f"{loss:.5f}", refresh=False)
    return training


def run(chosen: argparse.Namespace) -> int:
    """Trains, draws and reports."""
    missing = [name for name in ("matplotlib", "tqdm") if find_spec(name) is None]
    if missing:
        print(f'The demo needs {" and ".join(missing)}: pip install "pyode[demo]"', file=sys.stderr)
        return 1
    if (why := obstacle(chosen.output)) is not None:
        print(f"--output {chosen.output}: {why}", file=sys.stderr)
        return 2
    threads = torch.get_num_threads()
    torch.set_num_threads(chosen.threads)
    try:
        with torch.no_grad():
            data = odeint(true_dynamics, START.double(), TIMES.double(), rtol=1e-9, atol=1e-11).float()
        training = train(data, chosen, "pyode", chosen.steps)
        # The twin takes the same first steps, from the same weights on the same mini-batches.
        twin = train(data, chosen, "pure Python", max(1, chosen.steps // 20), reference=True)
    finally:
        torch.set_num_threads(threads)
    fit = training.fit()
    fields = (partial(true_dynamics, TIMES[0]), partial(training.network, TIMES[0]))
    draw(TIMES, data, fit, fields, training.losses, chosen.output)
    print(report(training, twin, fit))
    print(f"\nThe picture is in {chosen.output}.")
    return 0


def report(training: Training, twin: Training, fit: Tensor) -> str:
    """The numbers, as a table."""
    n, measured = len(training.losses), len(twin.losses)
    ours, theirs = sum(training.seconds[:measured]), sum(twin.seconds)
    total = sum(training.seconds)
    forward, backward = training.forward, training.backward
    error = float((fit - training.data).abs().mean())

    def row(label: str, *cells: str, note: str = "") -> str:
        return f"{label:<26}{''.join(f'{cell:>13}' for cell in cells)}  {note}".rstrip()

    def counts(label: str, name: str) -> str:
        there, back = getattr(forward, name), getattr(backward, name)
        return row(label, f"{there:,}", f"{back:,}", f"{there + back:,}")

    averaged = f"mean |y - data|, last {min(n, LOSSES_AVERAGED)} mini-batches"
    estimated = "pure Python: estimated by the ratio" if measured < n else ""
    return "\n".join(
        (
            "",
            row("final loss", f"{training.final_loss:.6f}", note=averaged),
            row("whole trajectory", f"{error:.6f}", note="mean |y - data|, t in [0, 25], from its start alone"),
            "",
            row("", "forward", "backward", "both"),
            counts("function evaluations", "n_f_evals"),
            counts("accepted steps", "n_accepted"),
            counts("rejected steps", "n_rejected"),
            "",
            row("", "pyode", "pure Python", "ratio"),
            row(f"training steps 1 to {measured}", f"{ours:.2f} s", f"{theirs:.2f} s", f"{theirs / ours:.2f}"),
            row(f"all {n} steps", f"{total:.2f} s", f"{total * theirs / ours:.2f} s", "", note=estimated),
        )
    )
