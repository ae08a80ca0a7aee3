"""What pyode is held against torchdiffeq with, and compiled dynamics against eager ones."""

from __future__ import annotations

import torch
from problems import growth, kepler, kepler_start, sine, spiral, tensor, van_der_pol
from torch import Tensor


def stiffish(t: Tensor, y: Tensor) -> Tensor:
    """Van der Pol's oscillator with sharp corners: many rejected steps."""
    return van_der_pol(t, y, 5.0)


PROBLEMS = {
    "van der Pol": (stiffish, tensor(2.0, 0.0), 8.0),
    "Kepler": (kepler, kepler_start(0.7), 7.0),
    "spiral": (spiral, torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.3, -1.5]], dtype=torch.float64), 10.0),
    "growth": (growth.f, growth.y0, 10.0),
    "sine": (sine.f, sine.y0, 5.0),
}


# The error estimate is a small difference of large numbers: rounding makes some 1e-10 of noise in the next step's size,
# dopri8's, with weights up to 100 in a step of order 8, a lot more where a step was much too small.
NOISE = {"dopri5": 1e-8, "bosh3": 1e-8, "dopri8": 1e-4}


def largest(e: Tensor) -> Tensor:
    return e.abs().max()


OPTIONS = {
    "nothing": {},
    "first_step": {"first_step": 0.01},
    "first_step too long": {"first_step": 2.0},
    "min_step": {"min_step": 0.05},
    "max_step": {"max_step": 0.08},
    "safety": {"safety": 0.7},
    "ifactor": {"ifactor": 1.5},
    "dfactor": {"dfactor": 0.6, "first_step": 2.0},
    "max_num_steps": {"max_num_steps": 1000},
    "dtype": {"dtype": torch.float64},
    "norm": {"norm": largest},
    "step_t": {"step_t": tensor(0.3, 0.1, 1.7, 99.0, -5.0)},
    "jump_t": {"jump_t": tensor(0.25, 1.1, -1.0)},
    "step_t and jump_t": {"step_t": tensor(0.6, 0.9), "jump_t": tensor(0.7)},
    "everything": {
        "first_step": 0.02, "min_step": 1e-4, "max_step": 0.3, "safety": 0.8, "ifactor": 4.0, "dfactor": 0.3,
        "step_t": tensor(0.6), "jump_t": tensor(0.7), "norm": largest,
    },
}  # fmt: skip


PARTS = (
    tensor(0.1, 0.2, 0.4, 0.6, 0.8, 1.0).reshape(2, 3),
    torch.tensor(2.0, dtype=torch.float64),
    tensor(0.1),
)


def coupled(t, parts):
    a, b, c = parts
    return torch.sin(3 * a) * b, -b * c.sum() + torch.cos(4 * t), a.sum() - c


TOLERANCES = {
    "a number": 1e-5,
    "an integer": 0,
    "a 0-dim tensor": torch.tensor(1e-5),
    "a number for each part": (1e-5, 1e-3, 1e-4),
    "a list": [1e-5, 1e-3, 1e-4],
    "a tensor of one for each part": tensor(1e-5, 1e-3, 1e-4),
    "a flat tensor for a part": (torch.linspace(1e-6, 1e-3, 6, dtype=torch.float64), 1e-3, tensor(1e-4)),
    "tensors for the parts": (torch.full((1,), 1e-5), torch.tensor(1e-3), tensor(1e-4)),
}


TENSOR_TOLERANCES = [
    torch.tensor([[1e-6, 1e-3], [1e-4, 1e-5]], dtype=torch.float64),
    tensor(1e-6, 1e-3),
    torch.tensor([[1e-5], [1e-3]]),
]

ADJOINTS = {
    "nothing": {},
    "other tolerances": {"adjoint_rtol": 1e-4, "adjoint_atol": 1e-5},
    "another method": {"adjoint_method": "dopri5"},
    "seminorm": {"adjoint_options": {"norm": "seminorm"}},
    "an option": {"adjoint_options": {"max_step": 0.05}},
    "a norm": {"adjoint_options": {"norm": lambda parts: torch.stack([part.abs().max() for part in parts]).max()}},
    "no parameters": {"adjoint_params": ()},
    "options that are inherited": {"options": {"max_step": 0.05, "first_step": 0.01}},
    "a norm of the forward solve": {"options": {"norm": lambda e: e.abs().max()}},
    "a jump": {"options": {"jump_t": tensor(0.45)}},
    "a step's end": {"options": {"step_t": tensor(0.45)}},
}
