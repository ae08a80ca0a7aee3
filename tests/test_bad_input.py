"""Bad input: one typed error each, that is the builtin torchdiffeq raises there, says what came, and comes first."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torchdiffeq
from problems import tensor

import pyode
from pyode import DynamicsError, InvalidType, InvalidValue, PyodeError, SolveError, Status
from pyode.methods import NAMES_IN_WARNINGS

Y0 = torch.ones(2)
T = torch.tensor([0.0, 1.0])
LONG = torch.int64


@dataclass
class Case:
    """What is wrong, and what has to be said about it."""

    name: str
    arguments: dict[str, Any]
    error: type[PyodeError]
    says: list[str]  # the argument, what was expected, what came
    builtin: type[BaseException] | None = None  # what torchdiffeq raises there; None where it does not mind
    calls_func: bool = field(default=False)


def decay(t, y):
    return tuple(-part for part in y) if isinstance(y, tuple) else -y


ARGUMENTS = [
    Case("t a list", {"t": [0.0, 1.0]}, InvalidType, ["t must be a tensor", "list"], AssertionError),
    Case("t a number", {"t": 1.0}, InvalidType, ["t must be a tensor", "float"], AssertionError),
    Case("t 2-D", {"t": T[None]}, InvalidValue, ["t must be 1-D", "(1, 2)"], AssertionError),
    Case("t 0-D", {"t": T[0]}, InvalidValue, ["t must be 1-D", "()"], AssertionError),
    Case("t integer", {"t": torch.tensor([0, 1])}, InvalidType, ["t must be floating", "int64"], TypeError),
    Case("t complex", {"t": T + 0j}, InvalidType, ["t must be floating", "complex64"], TypeError),
    Case("t repeats", {"t": tensor(0, 0.5, 0.5)}, InvalidValue,
         ["t must be strictly monotonic", "t[1] = 0.5", "t[2] = 0.5"], AssertionError),
    Case("t turns", {"t": tensor(0, 0.5, 0.25)}, InvalidValue,
         ["strictly monotonic", "t[1] = 0.5", "t[2] = 0.25"], AssertionError),
    Case("t turns, backward", {"t": tensor(1, 0.5, 0.75)}, InvalidValue,
         ["strictly monotonic", "t[1] = 0.5", "t[2] = 0.75"], AssertionError),
    Case("t nan", {"t": tensor(0, math.nan)}, InvalidValue, ["t[1] = nan"], AssertionError),
    Case("t inf", {"t": tensor(0, math.inf)}, InvalidValue, ["t must be finite"]),  # torchdiffeq never returns
    Case("t empty", {"t": tensor()}, InvalidValue, ["t must not be empty"]),
    Case("y0 integer", {"y0": torch.ones(2, dtype=LONG)}, InvalidType,
         ["y0 must be floating or complex", "int64", "y0.float()"], RuntimeError),
    Case("y0 boolean", {"y0": Y0 > 0}, InvalidType, ["y0 must be floating or complex", "bool"], RuntimeError),
    Case("y0 of eight bits", {"y0": Y0.to(torch.float8_e5m2)}, InvalidType,
         ["y0 must be floating or complex", "float16", "float8_e5m2"], RuntimeError),
    Case("y0 sparse", {"y0": Y0.to_sparse()}, InvalidType, ["y0 must be dense", "sparse_coo", "y0.to_dense()"],
         RuntimeError),
    Case("a part of y0 sparse", {"y0": (Y0, Y0.to_sparse())}, InvalidType, ["y0[1] must be dense", "y0[1].to_dense()"],
         RuntimeError),
    Case("y0 a list of numbers", {"y0": [1.0]}, InvalidType,
         ["y0 must be a tensor or a tuple", "y0[0] is a float"], AssertionError),
    Case("y0 a number", {"y0": 1.0}, InvalidType, ["y0 must be a tensor or a tuple", "float"], AssertionError),
    Case("y0 a tuple of numbers", {"y0": (1.0,)}, InvalidType, ["y0 must be a tensor or a tuple", "y0[0] is a float"]),
    Case("y0 an empty tuple", {"y0": ()}, InvalidType, ["y0 must be a tensor or a tuple", "nothing"]),
    Case("y0 on two devices", {"y0": (Y0, torch.ones(2, device="meta"))}, InvalidValue,
         ["one device", "y0[0] is on cpu", "y0[1] on meta"], RuntimeError),
    Case("rtol negative", {"rtol": -1e-3}, InvalidValue, ["rtol must be finite and not negative", "-0.001"]),
    Case("rtol nan", {"rtol": math.nan}, InvalidValue, ["rtol must be", "nan"], AssertionError),
    Case("atol nan", {"atol": math.nan}, InvalidValue, ["atol must be", "nan"], AssertionError),
    Case("atol infinite", {"atol": math.inf}, InvalidValue, ["atol must be finite", "inf"]),
    Case("atol negative inside", {"atol": tensor(1e-3, -1e-3)}, InvalidValue, ["atol must be", "-0.001"]),
    Case("rtol of a wrong shape", {"rtol": torch.ones(3)}, InvalidValue,
         ["rtol must be a number or broadcast", "(2,)", "(3,)"], RuntimeError),
    Case("atol of too many dimensions", {"atol": torch.ones(2, 2)}, InvalidValue, ["atol must", "(2, 2)"]),
    Case("rtol for too few parts", {"y0": (Y0, Y0), "rtol": (1e-3,)}, InvalidValue,
         ["rtol must have one entry for each of the 2 parts", "1"], AssertionError),
    Case("atol of a part's wrong shape", {"y0": (Y0, Y0), "atol": (1e-3, torch.ones(3))}, InvalidValue,
         ["atol[1]", "(3,)", "(2,)"], RuntimeError),
    Case("rtol with gradient", {"rtol": torch.ones(2, requires_grad=True)}, InvalidValue,
         ["rtol cannot require gradient", "detach"], AssertionError),
    Case("rtol a string", {"rtol": "small"}, InvalidType, ["rtol must be a number or a tensor", "str"], TypeError),
    Case("atol None", {"atol": None}, InvalidType, ["atol must be a number or a tensor", "NoneType"], TypeError),
    Case("method unknown", {"method": "dopri"}, InvalidValue,
         ["method must be one of", "rk4", "'dopri'", "did you mean 'dopri"], ValueError),
    Case("method misspelt", {"method": "adaptive_huen"}, InvalidValue, ["did you mean 'adaptive_heun'?"], ValueError),
    Case("method a number", {"method": 5}, InvalidValue, ["method must be one of", "5"], ValueError),
    Case("method a list", {"method": ["dopri5"]}, InvalidValue, ["method must be one of", "['dopri5']"]),
    Case("args a number", {"args": 0}, InvalidType, ["args must be a tuple", "int", "(x,)"]),
    Case("args None", {"args": None}, InvalidType, ["args must be a tuple", "NoneType"]),
    Case("func no function", {"func": 3}, InvalidType, ["func must be callable", "int"], TypeError),
]  # fmt: skip


def option(name: str, value: Any, error: type, says: list[str], builtin: Any = None, **more: Any) -> Case:
    options = {name: value, **more.pop("options", {})}
    return Case(f"{name} {value!r}"[:40], {"options": options, **more}, error, says, builtin)


RK4 = {"method": "rk4"}
OPTIONS = [
    *(option(name, "x", InvalidType, [name, "number", "'x'"], TypeError)
      for name in ("safety", "ifactor", "dfactor", "first_step", "min_step", "max_step", "max_num_steps")),
    option("safety", -1.0, InvalidValue, ["safety", "-1.0"]),
    option("ifactor", 0.5, InvalidValue, ["ifactor", "at least 1", "0.5"]),
    option("dfactor", 2.0, InvalidValue, ["dfactor", "between 0 and 1", "2.0"]),
    option("min_step", -0.1, InvalidValue, ["min_step", "-0.1"]),
    option("max_step", math.nan, InvalidValue, ["max_step", "nan"]),
    option("first_step", math.nan, InvalidValue, ["first_step", "nan"]),
    option("max_num_steps", math.inf, InvalidValue, ["max_num_steps", "inf"], RuntimeError),
    option("dtype", "float32", InvalidType, ["dtype", "torch.dtype", "str"], TypeError),
    option("dtype", 5, InvalidType, ["dtype", "torch.dtype", "int"], TypeError),
    option("dtype", torch.complex64, InvalidValue, ["dtype", "real and floating", "complex64"], RuntimeError),
    option("dtype", LONG, InvalidValue, ["dtype", "real and floating", "int64"]),
    option("norm", 3, InvalidType, ["norm", "callable", "int"], TypeError),
    option("step_t", tensor(0.5, 0.5), InvalidValue, ["step_t", "repeated", "0.5"], ValueError),
    option("step_t", tensor(math.nan), InvalidValue, ["step_t", "finite"]),
    option("jump_t", tensor(0.5), InvalidValue, ["jump_t", "repeated", "0.5"], ValueError,
           options={"step_t": tensor(0.5)}),
    option("interp", "quintic", InvalidValue, ["interp", "linear, cubic", "'quintic'"], ValueError, **RK4),
    option("step_size", -0.1, InvalidValue, ["step_size", "positive", "-0.1"], RuntimeError, **RK4),
    option("step_size", 0.0, InvalidValue, ["step_size", "positive", "0.0"], RuntimeError, **RK4),
    option("step_size", "x", InvalidType, ["step_size", "number", "'x'"], TypeError, **RK4),
    option("step_size", 0.1, InvalidValue, ["step_size and grid_constructor", "mutually exclusive"], ValueError,
           options={"grid_constructor": lambda f, y0, t: t}, **RK4),
    option("grid_constructor", lambda f, y0, t: t + 1, InvalidValue,
           ["grid_constructor", "t[0] to t[-1]"], AssertionError, **RK4),
    option("grid_constructor", lambda f, y0, t: [0.0, 1.0], InvalidType, ["grid_constructor"], TypeError, **RK4),
    option("step_size", 1e-300, InvalidValue, ["step_size", "1e-300", "too many"], RuntimeError, **RK4),
    option("grid_constructor", 3, InvalidType, ["grid_constructor", "callable", "int"], TypeError, **RK4),
    option("grid_constructor", lambda f, y0, t: torch.tensor([0.0, 0.7, 0.3, 1.0]), InvalidValue,
           ["grid_constructor", "in order", "0.7"], **RK4),
    option("grid_constructor", lambda f, y0, t: torch.tensor([0.0, math.nan, 1.0]), InvalidValue,
           ["grid_constructor", "in order", "nan"], **RK4),
    option("step_t", "x", InvalidType, ["step_t", "times", "'x'"], TypeError),
    option("jump_t", [[0.1], [0.2, 0.3]], InvalidType, ["jump_t", "times"]),
    option("first_step", math.inf, InvalidValue, ["first_step", "finite"]),
    option("min_step", 1.0, InvalidValue, ["min_step", "1", "max_step", "0.1"], options={"max_step": 0.1}),
    option("stats", {}, InvalidType, ["stats", "pyode.Stats", "dict"]),
    Case("options an empty list", {"options": []}, InvalidType, ["options", "dict", "list"], TypeError),
    Case("options a list", {"options": [1]}, InvalidType, ["options", "dict", "list"], TypeError),
]  # fmt: skip

RETURNS = [
    Case("a norm that is no number", {"options": {"norm": lambda e: "large"}}, InvalidType, ["norm", "'large'"]),
    Case("a norm of two numbers", {"options": {"norm": lambda e: e}}, InvalidValue, ["norm", "one number", "(2,)"],
         RuntimeError),
    Case("another shape", {"func": lambda t, y: torch.ones(3)}, DynamicsError, ["func", "(2,)", "(3,)"], RuntimeError),
    Case("a shape that broadcasts", {"func": lambda t, y: y[:1]}, DynamicsError, ["(2,)", "(1,)"], RuntimeError),
    Case("a scalar", {"func": lambda t, y: y.sum()}, DynamicsError, ["(2,)", "()"], RuntimeError),
    Case("another device", {"func": lambda t, y: torch.ones(2, device="meta")}, DynamicsError,
         ["device", "cpu", "meta"], RuntimeError),
    Case("a complex value", {"func": lambda t, y: 1j * y}, DynamicsError, ["complex64", "float32", "make y0 complex"]),
    Case("a number", {"func": lambda t, y: 1.0}, DynamicsError, ["func", "tensor", "float"]),
    Case("None", {"func": lambda t, y: None}, DynamicsError, ["func", "tensor", "NoneType"]),
    Case("an array", {"func": lambda t, y: y.numpy()}, DynamicsError, ["func", "tensor", "ndarray"]),
    Case("a tuple", {"func": lambda t, y: (y,)}, DynamicsError, ["func", "tensor", "tuple of Tensor"]),
    Case("no tuple", {"y0": (Y0, Y0), "func": lambda t, y: y[0]}, DynamicsError, ["tuple of 2"], RuntimeError),
    Case("too few parts", {"y0": (Y0, Y0), "func": lambda t, y: (y[0],)}, DynamicsError, ["2", "1"], RuntimeError),
    Case("a part of another shape", {"y0": (Y0, Y0), "func": lambda t, y: (y[0], y[1][:1])}, DynamicsError,
         ["func()[1]", "(2,)", "(1,)"], RuntimeError),
]  # fmt: skip


def call(module, case: Case) -> tuple[Any, int]:
    """The exception and the number of calls of func."""
    calls = 0
    arguments = {"y0": Y0, "t": T, "func": decay, **case.arguments}
    func = arguments.pop("func")
    if callable(func):
        inner = func

        def func(t, y):
            nonlocal calls
            calls += 1
            return inner(t, y)

    try:
        module.odeint(func, arguments.pop("y0"), arguments.pop("t"), **arguments)
    except Exception as error:
        return error, calls
    return None, calls


@pytest.mark.parametrize("case", [*ARGUMENTS, *OPTIONS, *RETURNS], ids=lambda case: case.name)
def test_the_error_is_typed_and_says_what_is_wrong(case):
    error, _ = call(pyode, case)
    assert type(error) is case.error
    assert isinstance(error, PyodeError)
    assert isinstance(error, case.builtin or Exception)
    for part in case.says:
        assert part in str(error)


@pytest.mark.parametrize("case", [*ARGUMENTS, *OPTIONS, *RETURNS], ids=lambda case: case.name)
def test_it_is_the_same_behind_a_solve_of_the_same_kind(case):
    alone, _ = call(pyode, case)
    pyode.odeint(decay, case.arguments.get("y0", Y0) if case in RETURNS else Y0, T)  # whose loop is used again
    again, _ = call(pyode, case)
    assert type(again) is type(alone)
    assert str(again) == str(alone)


@pytest.mark.parametrize("case", [*ARGUMENTS, *OPTIONS], ids=lambda case: case.name)
def test_it_comes_before_func_is_called(case):
    assert call(pyode, case)[1] == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case", [case for case in [*ARGUMENTS, *OPTIONS, *RETURNS] if case.builtin], ids=lambda c: c.name
)
def test_torchdiffeq_raises_the_builtin_there(case):
    error, _ = call(torchdiffeq, case)
    assert isinstance(error, case.builtin)


@pytest.mark.parametrize("case", [*ARGUMENTS, *OPTIONS, *RETURNS], ids=lambda case: case.name)
def test_errors_pickle(case):
    error, _ = call(pyode, case)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.args == error.args


def test_solve_errors_pickle_with_their_attributes():
    for status in (Status.STEP_TOO_SMALL, Status.TOO_MANY_STEPS, Status.NON_FINITE):
        error = SolveError(status, 0.25, -1e-9, 17)
        again = pickle.loads(pickle.dumps(error))
        assert str(again) == str(error)
        assert (again.status, again.t, again.dt, again.n_steps) == (status, 0.25, -1e-9, 17)
        assert isinstance(again, AssertionError)
        assert isinstance(again, RuntimeError)


def test_torchdiffeqs_assertion_for_a_failed_solve_catches_ours():
    for module in (torchdiffeq, pyode):
        with pytest.raises(AssertionError, match="max_num_steps"):
            module.odeint(decay, Y0, T, options={"max_num_steps": 1})
        with pytest.raises(AssertionError, match="underflow"):
            module.odeint(lambda t, y: 1e3 * y * y, Y0.double(), T)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_unknown_options_are_warned_of_and_ignored(method):
    expected = pyode.odeint(decay, Y0, T, method=method)
    options = {"frist_step": 0.1}
    with pytest.warns(
        UserWarning, match=f"{NAMES_IN_WARNINGS[method]}: Unexpected arguments.*frist_step.*first_step|step_size"
    ) as caught:
        assert torch.equal(pyode.odeint(decay, Y0, T, method=method, options=options), expected)
    assert caught[0].filename == __file__  # it points at the caller
    with pytest.warns(UserWarning, match="Unexpected arguments"):
        torchdiffeq.odeint(decay, Y0, T, method=method, options=options)


def test_the_other_kind_of_methods_options_are_unknown():
    with pytest.warns(UserWarning, match="step_size"):
        pyode.odeint(decay, Y0, T, options={"step_size": 0.1})
    with pytest.warns(UserWarning, match="safety"):
        pyode.odeint(decay, Y0, T, method="rk4", options={"safety": 0.1})


def test_options_are_not_changed():
    options = {"first_step": 0.1, "step_t": tensor(0.5), "norm": lambda e: e.abs().max()}
    before = dict(options)
    pyode.odeint(decay, Y0, T, options=options)
    assert options == before


def test_backend_takes_only_its_two_names():
    with pytest.raises(InvalidValue, match="'fast'"), pyode.backend("fast"):
        pass


def test_an_adjoint_needs_a_module_or_its_parameters():
    for module in (torchdiffeq, pyode):
        with pytest.raises(ValueError, match="adjoint_params"):
            module.odeint_adjoint(decay, Y0, T)
    assert pyode.odeint_adjoint(decay, Y0, T, adjoint_params=()).shape == (2, 2)


def test_options_of_another_adjoint_method_cannot_be_guessed():
    for module in (torchdiffeq, pyode):
        with pytest.raises(ValueError, match="adjoint_options"):
            module.odeint_adjoint(decay, Y0, T, adjoint_params=(), options={"first_step": 0.1}, adjoint_method="bosh3")


ADJOINT = [
    Case("adjoint_rtol negative", {"adjoint_rtol": -1.0}, InvalidValue, ["adjoint_rtol", "-1.0"]),
    Case("adjoint_atol nan", {"adjoint_atol": math.nan}, InvalidValue, ["adjoint_atol", "nan"]),
    Case("adjoint_method unknown", {"adjoint_method": "rk5"}, InvalidValue, ["adjoint_method", "rk4"], ValueError),
    Case("adjoint_params a number", {"adjoint_params": (1.0,)}, InvalidType, ["adjoint_params", "float"]),
]  # fmt: skip


@pytest.mark.parametrize("case", ADJOINT, ids=lambda case: case.name)
def test_the_adjoints_arguments_are_checked_before_func_is_called(case):
    calls = []

    def func(t, y):
        calls.append(t)
        return -y

    with pytest.raises(case.error) as caught:
        pyode.odeint_adjoint(func, Y0, T, **{"adjoint_params": (), **case.arguments})
    assert not calls
    assert isinstance(caught.value, case.builtin or Exception)
    for part in case.says:
        assert part in str(caught.value)


@pytest.mark.parametrize("wrong", ["noon", None, Y0, torch.empty(0)], ids=repr)
def test_a_start_or_end_that_is_no_single_time_is_named(wrong):
    calls = [
        ("t0", lambda: pyode.odeint_event(decay, Y0, wrong, event_fn=lambda t, y: y[0] - 0.5)),
        ("t0", lambda: pyode.odeint_dense(decay, Y0, wrong, 1.0)),
        ("t1", lambda: pyode.odeint_dense(decay, Y0, T[0], wrong)),
    ]
    for name, solve in calls:
        with pytest.raises(InvalidType, match=f"{name} must be a number or a tensor of one number, not"):
            solve()


@pytest.mark.parametrize("start", [0, 0.0, torch.tensor(0), torch.tensor([0.0])], ids=repr)
def test_a_start_may_be_a_number_or_a_tensor_of_one(start):
    time, _ = pyode.odeint_event(decay, Y0.double(), start, event_fn=lambda t, y: y[0] - 0.5)
    assert float(time) == pytest.approx(math.log(2))
    assert torch.allclose(pyode.odeint_dense(decay, Y0.double(), start, 1)(1.0), torch.exp(-Y0.double()))
