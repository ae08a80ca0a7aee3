"""What a step costs around f with a step size for each sample, against one for all, and against torchode."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import pyode

from .timing import Contender, interleaved, repeated

TITLE = "A step, f excluded (dopri5, float32, 200 steps of one size, no gradients) [microseconds]"
COLUMNS = {
    "shape": "state",
    "joint_us": "joint",
    "per_sample_us": "per sample",
    "outputs_us": "per sample, 20 outputs each",
    "torchode_us": "torchode",
    "ratio": "per sample / joint",
    "outputs_ratio": "20 outputs / joint",
    "torchode_ratio": "torchode / per sample",
}
SHAPES = ((256, 2), (1024, 3), (256, 64))
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # torchode does
STEPS = 200
EVALUATIONS = 6 * STEPS + 1
OPTIONS = {"max_step": 1 / STEPS}  # of a solve whose tolerances no step would violate


def still(t: Tensor, y: Tensor) -> Tensor:
    """A f that costs next to nothing."""
    return -y


def spread(samples: int, n: int) -> Tensor:
    """n output times in [0, 1] for each sample, all different: [n + 2, samples]."""
    generator = torch.Generator().manual_seed(0)
    inner = torch.rand(n, samples, generator=generator, dtype=torch.float64).sort(0).values
    return torch.cat([torch.zeros(1, samples, dtype=torch.float64), inner, torch.ones(1, samples, dtype=torch.float64)])


def solver(y0: Tensor, t: Tensor, control: str) -> Callable[[], pyode.Solution]:
    """A solve of STEPS steps."""
    return partial(
        pyode.solve_ivp, still, y0, t, control=control, rtol=1.0, atol=1.0, first_step=1 / STEPS, options=dict(OPTIONS)
    )


def torchode_solver(y0: Tensor) -> Contender | None:
    """The same by torchode; None if it is not installed."""
    try:
        import torchode
    except ImportError:
        return None
    term = torchode.ODETerm(still)
    control = torchode.IntegralController(atol=1.0, rtol=1.0, term=term, dt_max=torch.tensor(1 / STEPS))
    adjoint = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), control)
    ends = torch.tensor([0.0, 1.0]).expand(len(y0), 2).contiguous()
    dt0 = torch.full((len(y0),), 1 / STEPS)
    return lambda: adjoint.solve(torchode.InitialValueProblem(y0=y0, t_eval=ends), dt0=dt0)


def contenders(shape: tuple[int, int]) -> dict[str, Contender]:
    """Those that are timed; all take about STEPS steps."""
    y0, ends = torch.ones(shape), torch.tensor([0.0, 1.0])
    several: dict[str, Contender] = {
        "joint": solver(y0, ends, "joint"),
        "per sample": solver(y0, ends, "per_sample"),
        "outputs": solver(y0, spread(shape[0], 20), "per_sample"),
        "f": repeated(still, EVALUATIONS, ends[0], y0),
    }
    theirs = torchode_solver(y0)
    return several if theirs is None else {**several, "torchode": theirs}


def check(shape: tuple[int, int]) -> None:
    """All take the steps that they are timed for, to the same result."""
    several = contenders(shape)
    for name in ("joint", "per sample", "outputs"):
        solution = several[name]()
        assert STEPS <= int(solution.stats.n_steps.max()) <= STEPS + 1, name
        assert torch.allclose(solution.ys[-1], torch.full(shape, 0.3678794), rtol=1e-4), name
    if "torchode" in several:
        theirs = several["torchode"]()
        assert STEPS <= int(theirs.stats["n_steps"].max()) <= STEPS + 2
        assert torch.allclose(theirs.ys[:, -1], torch.full(shape, 0.3678794), rtol=1e-4)


def measure(seconds: float = 20.0) -> list[dict[str, Any]]:
    """A row for every shape."""
    rows = []
    with torch.no_grad():
        for shape in SHAPES:
            check(shape)
            times = interleaved(contenders(shape), seconds=seconds, warm_up=1)
            around = {name: 1e6 * (time - times["f"]) / STEPS for name, time in times.items()}
            row = {
                "shape": f"[{shape[0]}, {shape[1]}]",
                "joint_us": around["joint"],
                "per_sample_us": around["per sample"],
                "outputs_us": around["outputs"],
                "ratio": around["per sample"] / around["joint"],
                "outputs_ratio": around["outputs"] / around["joint"],
                "torchode_us": around.get("torchode", float("nan")),
                "torchode_ratio": around.get("torchode", float("nan")) / around["per sample"],
            }
            rows.append(row)
    return rows


@pytest.mark.parametrize("solver", ["joint", "per sample", "outputs"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch(benchmark: Any, shape: tuple[int, int], solver: str) -> None:
    benchmark.group = str(shape)
    with torch.no_grad():
        check(shape)
        benchmark(contenders(shape)[solver])
