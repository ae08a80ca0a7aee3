"""Fast ODE solvers for PyTorch: C++ and CUDA kernels behind torchdiffeq's interface."""

from ._ops import backend
from ._version import __version__
from .adjoint import odeint_adjoint
from .caches import clear_cache
from .compiled.dynamics import CompiledDynamics, compile
from .dense import DenseOutput, odeint_dense
from .errors import CompileError, DynamicsError, InvalidType, InvalidValue, PyodeError, SolveError, Status
from .events import odeint_event
from .odeint import odeint
from .patch import patch_torchdiffeq
from .solution import Solution, Stats
from .solve_ivp import solve_ivp

__all__ = [
    "CompileError",
    "CompiledDynamics",
    "DenseOutput",
    "DynamicsError",
    "InvalidType",
    "InvalidValue",
    "PyodeError",
    "Solution",
    "SolveError",
    "Stats",
    "Status",
    "__version__",
    "backend",
    "clear_cache",
    "compile",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "patch_torchdiffeq",
    "solve_ivp",
]
