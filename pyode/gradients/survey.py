"""What an evaluation of func depends on, and what its graph takes: found by walking through autograd's graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ..errors import warn


def warn_of_loss(tensor: Tensor) -> None:
    """Tells of a tensor that requires gradient and will get none."""
    warn(
        f"func depends on a tensor of shape {tuple(tensor.shape)} that requires gradient and is not among those that "
        "were found in func or named, so that it gets none: make it a parameter of func, pass it in args, or name it "
        "in params. If its gradient is not wanted, detach it."
    )


class Survey:
    """Looks at the first evaluations of a solve.

    Warns of a tensor that requires gradient and will get none: one on which func depends and that is not listed. A
    tensor that func makes itself, to differentiate by, is another one in each evaluation; so it takes two to tell.

    Args:
        listed: the tensors that get gradients.
        warns: whether to.
    """

    def __init__(self, listed: Iterable[Tensor], warns: bool = True) -> None:
        self.listed, self.warns = list(listed), warns
        self._suspects: list[Tensor] | None = None

    def __call__(self, k: Tensor, inputs: tuple[Tensor, ...]) -> int | None:
        """Returns how many bytes an evaluation's graph takes, its inputs included; None if another look is needed.

        Args:
            k: what func returned.
            inputs: what it was given.
        """
        nodes = self.look(k, inputs)
        if nodes is None:
            return None
        sizes = {x.data_ptr(): x.nbytes for x in inputs}
        for node in nodes:
            sizes.update((x.data_ptr(), x.untyped_storage().nbytes()) for x in _saved(node))
        for x in (*self.listed, *(self._suspects or ())):
            sizes.pop(x.data_ptr(), None)
        return sum(sizes.values())

    def look(self, k: Tensor, inputs: tuple[Tensor, ...]) -> list[Any] | None:
        """Warns, and returns the nodes of an evaluation's graph but its leaves; None if another look is needed."""
        known = {get_gradient_edge(x).node for x in (*self.listed, *inputs) if x.requires_grad}
        nodes: list[Any] = []
        suspects: list[Tensor] = []
        for node in _nodes(k, known):
            if hasattr(node, "variable"):
                suspects.append(node.variable)
            else:
                nodes.append(node)
        before, self._suspects = self._suspects, suspects
        if suspects and self.warns:
            if before is None:
                return None
            for variable in suspects:
                if any(variable is other for other in before):
                    warn_of_loss(variable)
                    break
        return nodes


def _nodes(k: Tensor, stops: set[Any]) -> Iterator[Any]:
    """The nodes of a graph behind a tensor, without those at which to stop and what is behind them."""
    waiting: list[Any] = [k.grad_fn]
    seen = {None, *stops}
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting.extend(before for before, _ in node.next_functions)


@lru_cache(maxsize=1024)
def _names(kind: Any) -> tuple[str, ...]:
    """The attributes of a kind of node that hold what it has saved."""
    return tuple(name for name in dir(kind) if name.startswith("_saved_") or name == "saved_tensors")


def _saved(node: Any) -> Iterator[Tensor]:
    """The tensors that a node has saved."""
    kind: Any = type(node)
    for name in _names(kind):
        value = getattr(node, name)
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(x, Tensor):
                yield x
