"""States that are structures of tensors: in and out as they are, and the same solve as of their parts in a tuple."""

from __future__ import annotations

from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from problems import tensor
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import pyode
from pyode import DynamicsError, InvalidType, InvalidValue, Stats

T = torch.linspace(0, 1, 4, dtype=torch.float64)
A, B, C = torch.linspace(0.1, 1, 6, dtype=torch.float64).reshape(2, 3), tensor(1.0), torch.tensor(2.0).double()

Point = namedtuple("Point", "x v angle")


@dataclass
class Body:
    x: Tensor
    v: Any


@dataclass(frozen=True)
class Registered:
    x: Tensor
    v: Tensor
    angle: Tensor


pytree.register_pytree_node(Registered, lambda r: ([r.x, r.v, r.angle], None), lambda parts, _: Registered(*parts))

# Each with the way from three parts in a tuple, and the way back.
STRUCTURES = {
    "a dict": (lambda a, b, c: {"a": a, "b": b, "c": c}, lambda s: (s["a"], s["b"], s["c"])),
    "an ordered dict": (lambda a, b, c: OrderedDict(a=a, b=b, c=c), lambda s: tuple(s.values())),
    "a list": (lambda a, b, c: [a, b, c], tuple),
    "a deque": (lambda a, b, c: deque([a, b, c]), tuple),
    "a named tuple": (Point, tuple),
    "a dataclass": (lambda a, b, c: Body(a, Body(b, c)), lambda s: (s.x, s.v.x, s.v.v)),
    "a registered dataclass": (Registered, lambda s: (s.x, s.v, s.angle)),
    "many levels": (lambda a, b, c: {"p": [Body(a, (b,))], "q": Point(c, (), {})}, lambda s: (
        s["p"][0].x, s["p"][0].v[0], s["q"].x)),
}  # fmt: skip
NESTED = pytest.mark.parametrize("name", STRUCTURES)


def coupled(t, parts):
    a, b, c = parts
    return -a * c, b * torch.cos(t), a.sum() - c


def nested(name):
    """func on a structure, and the structure's way from three parts and back."""
    make, parts_of = STRUCTURES[name]
    return lambda t, state: make(*coupled(t, parts_of(state))), make, parts_of


@NESTED
@pytest.mark.parametrize("solve", [pyode.odeint, pyode.odeint_adjoint], ids=lambda f: f.__name__)
@pytest.mark.parametrize("method", ["dopri5", "rk4", "implicit_adams"])
def test_it_is_the_solve_of_the_parts_in_a_tuple_to_the_bit(name, solve, method):
    func, make, parts_of = nested(name)
    found = []
    for f, wrap, unwrap in ((coupled, lambda *parts: parts, tuple), (func, make, parts_of)):
        parts = [part.clone().requires_grad_() for part in (A, B, C)]
        adjoint = {"adjoint_params": ()} if solve is pyode.odeint_adjoint else {}
        options = {} if method == "dopri5" else {"step_size": 0.02}
        state = solve(f, wrap(*parts), T, method=method, options=options, **adjoint)
        assert type(state) is type(wrap(*parts))
        outputs = unwrap(state)
        assert [out.shape for out in outputs] == [(4, *part.shape) for part in parts]
        sum((out * out.detach()).sum() for out in outputs).backward()
        found.append([*outputs, *(part.grad for part in parts)])
    assert all(torch.equal(x, y) for x, y in zip(*found))


def test_a_dict_is_matched_by_its_keys_whatever_their_order():
    def func(t, y):
        return {"slow": -y["slow"], "fast": -3 * y["fast"]}

    y = pyode.odeint(func, {"fast": A, "slow": B}, T)
    assert list(y) == ["fast", "slow"]
    assert torch.allclose(y["fast"][-1], A * torch.exp(-3 * T[-1]), rtol=1e-6)
    assert torch.allclose(y["slow"][-1], B * torch.exp(-T[-1]), rtol=1e-6)


def test_a_named_tuple_is_a_tuple_to_a_func_that_knows_tuples_only():
    y = pyode.odeint(coupled, Point(A, B, C), T)
    assert isinstance(y, Point)
    assert all(torch.equal(x, z) for x, z in zip(y, pyode.odeint(coupled, (A, B, C), T)))


@NESTED
@pytest.mark.parametrize("per_leaf", [(1e-5, 1e-3, 1e-4), (torch.linspace(1e-6, 1e-3, 6).double(), 1e-3, tensor(1e-4))])
def test_tolerances_are_one_for_each_part_in_a_like_structure_or_in_a_row(name, per_leaf):
    func, make, parts_of = nested(name)
    kwargs = {"rtol": 1e-5, "options": {"first_step": 0.05}}
    expected = pyode.odeint(coupled, (A, B, C), T, atol=per_leaf, **kwargs)
    for atol in (make(*per_leaf), per_leaf, list(per_leaf)):
        found = parts_of(pyode.odeint(func, make(A, B, C), T, atol=atol, **kwargs))
        assert all(torch.equal(x, y) for x, y in zip(found, expected))
    with pytest.raises(InvalidValue, match="one entry for each of the 3 parts of y0, not 2"):
        pyode.odeint(func, make(A, B, C), T, atol=(1e-3, 1e-4))


def test_each_leaf_is_a_segment_of_the_norm():
    # A part that hardly moves does not dilute the error of one that does.
    counts = []
    for y0 in ({"x": B, "ballast": torch.ones(1000).double()}, {"x": B}):
        stats = Stats()
        pyode.odeint(
            lambda t, y: {key: -torch.sin(9 * t) * part if key == "x" else 0 * part for key, part in y.items()},
            y0, T, options={"stats": stats},
        )  # fmt: skip
        counts.append(stats)
    assert counts[0] == counts[1]


@NESTED
def test_a_users_norm_and_grid_are_given_the_structure(name):
    func, make, parts_of = nested(name)
    kinds = set()

    def norm(error):
        kinds.add(type(error))
        return torch.stack([part.abs().max() for part in parts_of(error)]).max()

    def grid(f, y0, t):
        kinds.add(type(y0))
        assert [part.shape for part in parts_of(f(t[0], y0))] == [A.shape, B.shape, C.shape]
        return t

    pyode.odeint(func, make(A, B, C), T, options={"norm": norm})
    pyode.odeint(func, make(A, B, C), T, method="rk4", options={"grid_constructor": grid})
    assert kinds == {type(make(A, B, C))}


def test_an_adjoint_norm_is_given_the_structure_where_it_is_not_a_flat_tuple():
    seen = []

    def norm(parts):
        seen.append([type(part) for part in parts])
        return max(leaf.abs().max() for leaf in pytree.tree_leaves(parts))

    field = nn.Linear(1, 1).double()
    for y0 in ({"x": B}, Point(B, B, B)):
        y = pyode.odeint_adjoint(
            lambda t, y: pytree.tree_map(field, y), y0, T, adjoint_params=field.parameters(),
            adjoint_options={"norm": norm},
        )  # fmt: skip
        pytree.tree_leaves(y)[0].sum().backward()
    assert seen[0] == [Tensor, dict, dict, Tensor, Tensor]  # t, y, adj_y, weight, bias
    assert seen[-1] == [Tensor, *[Tensor] * 6, Tensor, Tensor]  # as torchdiffeq has it for a tuple


@NESTED
@pytest.mark.parametrize("solve", [pyode.odeint, pyode.odeint_adjoint], ids=lambda f: f.__name__)
def test_events_and_dense_output_are_those_of_the_parts_in_a_tuple(name, solve):
    func, make, parts_of = nested(name)
    found = []
    for f, wrap, unwrap in ((coupled, lambda *parts: parts, tuple), (func, make, parts_of)):
        c = C.clone().requires_grad_()
        interface = solve if solve is pyode.odeint else partial(solve, adjoint_params=())
        time, states = pyode.odeint_event(
            f, wrap(A, B, c), T[0], event_fn=lambda t, y, unwrap=unwrap: unwrap(y)[0].sum() - 1.5,
            odeint_interface=interface,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(time + sum(part.sum() for part in unwrap(states)), c)
        dense = pyode.odeint_dense(f, wrap(A, B, C), 0.0, 1.0)
        found.append([time, *unwrap(states), gradient, *unwrap(dense(T))])
    assert all(torch.equal(x, y) for x, y in zip(*found))


WRONG_STATES = {
    "a leaf that is a number": ({"a": B, "b": [B, 1.0]}, InvalidType, "y0['b'][1] is a float"),
    "None": ({"a": None}, InvalidType, "y0['a'] is a NoneType"),
    "a field that is a string": ([Body(B, "v")], InvalidType, "y0[0].v is a str"),
    "nothing": ({}, InvalidType, "not a dict"),
    "no leaf": ([[], {}], InvalidType, "must be a tensor or a tuple, list, dict"),
    "integers": ({"a": torch.ones(2, dtype=torch.int64)}, InvalidType, "must be floating or complex, not torch.int64"),
    "two devices": (Body(B, [B.to("meta")]), InvalidValue, "y0.x is on cpu, y0.v[0] on meta"),
    "a dataclass, not an instance": (Body, InvalidType, "y0 is a type"),
}


@pytest.mark.parametrize("name", WRONG_STATES)
def test_a_wrong_state_is_an_error_that_names_the_leaf(name):
    y0, error, says = WRONG_STATES[name]
    with pytest.raises(error) as caught:
        pyode.odeint(lambda t, y: y, y0, T)
    assert says in str(caught.value)


WRONG_RETURNS = {
    "a missing key": (lambda y: {"a": y["a"]}, "like y0's"),
    "another key": (lambda y: {"a": y["a"], "c": y["b"]}, "{'c'}"),
    "a tensor": (lambda y: y["a"], "like y0's"),
    "a tuple": (lambda y: (y["a"], y["b"]), "tuple"),
    "another dataclass": (lambda y: {"a": y["a"], "b": Registered(y["b"].x, y["b"].v, B)}, "expected a Body"),
    "a number": (lambda y: {"a": 1.0, "b": y["b"]}, "func()['a'] must return a tensor"),
    "another shape": (
        lambda y: {"a": y["a"], "b": Body(y["b"].x, torch.ones(7))},
        "func()['b'].v must return the shape",
    ),
}


@pytest.mark.parametrize("name", WRONG_RETURNS)
def test_a_func_that_returns_another_structure_is_told_so(name):
    wrong, says = WRONG_RETURNS[name]
    with pytest.raises(DynamicsError) as caught:
        pyode.odeint(lambda t, y: wrong(y), {"a": A, "b": Body(B, C)}, T)
    assert says in str(caught.value)


def test_a_tolerance_of_another_structure_is_an_error():
    for atol in ({"a": 1e-3, "c": 1e-3}, {"a": 1e-3}, object(), None):
        with pytest.raises(InvalidType, match="one for each part of y0"):
            pyode.odeint(lambda t, y: y, {"a": A, "b": B}, T, atol=atol)
    with pytest.raises(InvalidValue, match=r"atol\['b'\] has shape \(3,\); y0\['b'\] has \(1,\)"):
        pyode.odeint(lambda t, y: y, {"a": A, "b": B}, T, atol={"a": 1e-3, "b": torch.ones(3)})


@NESTED
def test_with_a_solver_of_scipys(name):
    func, make, parts_of = nested(name)
    found = parts_of(pyode.odeint(func, make(A, B, C), T, method="scipy_solver", options={"solver": "RK45"}))
    expected = pyode.odeint(coupled, (A, B, C), T, method="scipy_solver", options={"solver": "RK45"})
    assert all(torch.equal(x, y) for x, y in zip(found, expected))


def test_one_time_is_the_start():
    y = pyode.odeint(lambda t, y: y, {"a": A, "b": [B]}, T[:1])
    assert torch.equal(y["a"], A[None])
    assert torch.equal(y["b"][0], B[None])
