"""Partial derivatives with respect to tensors of which some were computed from others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


def partial_derivatives(params: Sequence[Tensor], totals: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """The gradients of tensors, each as if all others had been there by themselves.

    Autograd's gradient of a tensor has what comes to it through others that were computed from it. When a node returns
    both, autograd would pass that on to it once more.

    Args:
        params: the tensors.
        totals: what autograd gives for each.
        create_graph: whether the partial derivatives are to be differentiated.
    """
    levels = _levels(params)
    found = list(totals)
    for level in range(1, max(levels, default=0) + 1):
        above = [i for i, its in enumerate(levels) if its < level and params[i].grad_fn is not None]
        here = [i for i, its in enumerate(levels) if its == level]
        through = torch.autograd.grad(
            [params[i] for i in above], [params[i] for i in here], [found[i] for i in above],
            retain_graph=True, create_graph=create_graph, allow_unused=True,
        )  # fmt: skip
        for i, gradient in zip(here, through):
            if gradient is not None:
                found[i] = found[i] - gradient
    return found


def _levels(params: Sequence[Tensor]) -> list[int]:
    """How many of the tensors lie at most, one computed from the other, between each and the end of all graphs."""
    if all(p.grad_fn is None for p in params):
        return [0] * len(params)
    nodes = [get_gradient_edge(p).node for p in params]
    levels: dict[Any, int] = dict.fromkeys(_from_last_to_first(nodes), 0)
    listed = set(nodes)
    for node, level in levels.items():
        for before, _ in node.next_functions:
            if before is not None:
                levels[before] = max(levels[before], level + (node in listed))
    return [levels[node] for node in nodes]


def _from_last_to_first(roots: Sequence[Any]) -> list[Any]:
    """The nodes of the graphs behind some, each before those that it was computed from."""
    seen: set[Any] = set()
    order = []
    waiting = [(root, False) for root in roots]
    while waiting:
        node, done = waiting.pop()
        if done:
            order.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            waiting.append((node, True))
            waiting.extend((before, False) for before, _ in node.next_functions)
    return order[::-1]
