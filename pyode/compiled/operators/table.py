"""The table, and what is to be known of operators beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

MOVES = frozenset([
    "_unsafe_view", "alias", "cat", "clone", "copy", "detach", "diagonal", "diagonal_scatter", "expand", "flip",
    "index", "index_select", "lift_fresh_copy", "movedim", "permute", "repeat", "reshape", "roll", "select",
    "select_scatter", "slice", "slice_scatter", "split", "split_with_sizes", "squeeze", "squeeze_", "stack", "t",
    "t_", "transpose", "transpose_", "unbind", "unfold", "unsqueeze", "unsqueeze_", "view",
])  # fmt: skip
FILLED = ("full_like", "zeros_like", "ones_like", "new_zeros", "new_ones", "new_full")
SIZED = (  # have sizes among their arguments
    "view", "_unsafe_view", "reshape", "expand", "repeat", "full", "zeros", "ones", "new_full", "new_zeros", "new_ones",
    "empty", "new_empty", "empty_permuted", "empty_strided", "new_empty_strided", "native_group_norm",
)  # fmt: skip
# May have whole numbers as results, which are exact in the state's dtype: counts of truth values, places, signs.
COUNTS = ("sum", "cumsum", "max", "min", "where", "add", "sub", "mul", "neg")

OPERATORS: dict[str, Callable[..., Any]] = {}
Operator = TypeVar("Operator", bound=Callable[..., Any])


def operator(function: Operator) -> Operator:
    """Adds a function of the graph and an operator's arguments to the table, under its own name."""
    OPERATORS[function.__name__.removeprefix("op_")] = function
    return function
