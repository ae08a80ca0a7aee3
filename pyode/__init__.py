"""Fast ODE solvers for PyTorch: C++ and CUDA kernels behind torchdiffeq's interface."""

from ._ops import backend
from ._version import __version__
from .adjoint import odeint_adjoint
from .dense import DenseOutput, odeint_dense
from .errors import DynamicsError, InvalidType, InvalidValue, PyodeError, SolveError, Status
from .events import odeint_event
from .odeint import odeint
from .patch import patch_torchdiffeq
from .solution import Stats

__all__ = [
    "DenseOutput",
    "DynamicsError",
    "InvalidType",
    "InvalidValue",
    "PyodeError",
    "SolveError",
    "Stats",
    "Status",
    "__version__",
    "backend",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "patch_torchdiffeq",
]
