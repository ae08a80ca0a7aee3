"""args of compiled dynamics: tensors are inputs that every solve brings along, all else is part of what was traced."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..methods import Tableau
from ..tree import Tree

if TYPE_CHECKING:
    from .dynamics import CompiledDynamics
    from .entry import Entry
    from .native import Library

PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)


class Slots:
    """func(t, y, *args) as a function of (t, y), with empty tensors in the places of those in args.

    Attributes:
        tensors: one for each tensor in args, in their order; the same for the same.
    """

    def __init__(self, func: Callable[..., Any], tree: Tree | None, leaves: list[Any]) -> None:
        self.func, self.tree = func, tree  # None: the leaves in a row
        made: dict[int, Tensor] = {}
        self.leaves = [_slot(leaf, made) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        self.__qualname__ = getattr(func, "__qualname__", type(func).__name__)

    def __call__(self, t: Tensor, y: Any) -> Any:
        """func(t, y, *args)."""
        return self.func(t, y, *(self.leaves if self.tree is None else self.tree.build(iter(self.leaves))))


def _slot(tensor: Tensor, made: dict[int, Tensor]) -> Tensor:
    """An empty tensor like this one; the one that was made for it before."""
    if id(tensor) not in made:
        slot = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        made[id(tensor)] = slot.requires_grad_(slot.is_floating_point() or slot.is_complex())
    return made[id(tensor)]


class WithArgs:
    """Compiled dynamics with the args of one solve.

    Args:
        compiled: of the function of (t, y) that stands for all args like these.
        func: with these.
        given: the tensors in args, by the id of the slots in which they are put.
    """

    def __init__(self, compiled: CompiledDynamics, func: Callable[..., Any], given: dict[int, Tensor]) -> None:
        self._compiled, self.func, self._given = compiled, func, given
        self.auto = compiled.auto

    @property
    def last(self) -> object:
        """As that of `CompiledDynamics`: the last solve with args like these."""
        return self._compiled.last

    @last.setter
    def last(self, solve: object) -> None:
        self._compiled.last = solve

    @property
    def last_samples(self) -> object:
        """The same."""
        return self._compiled.last_samples

    @last_samples.setter
    def last_samples(self, solve: object) -> None:
        self._compiled.last_samples = solve

    def unchanged(self) -> bool:
        """As that of `CompiledDynamics`."""
        return self._compiled.unchanged()

    def inputs_of(self, entry: Entry) -> list[Tensor]:
        """The tensors that func uses, those in args among them."""
        return entry.given(self._given).inputs

    def entry(
        self, shapes: list[torch.Size], is_tuple: bool, dtype: torch.dtype, method: Tableau, per_sample: bool = False
    ) -> Entry | None:
        """As that of `CompiledDynamics`; its inputs are what was given."""
        found = self._compiled.entry(shapes, is_tuple, dtype, method, per_sample)
        return None if found is None else found.given(self._given)

    def library(self, entry: Entry, wanted: tuple[int, ...] | None) -> Library | None:
        """As that of `CompiledDynamics`."""
        return self._compiled.library(entry, wanted)

    def pays(
        self, native: Callable[[Tensor], Any], eager: Callable[[Tensor], Any], y0: Tensor, kind: tuple[Any, ...]
    ) -> bool:
        """As that of `CompiledDynamics`."""
        return self._compiled.pays(native, eager, y0, kind)

    def backsolving(self, entry: Entry, wanted: tuple[int, ...]) -> Library | None:
        """As that of `CompiledDynamics`."""
        return self._compiled.backsolving(entry, wanted)


def is_flat(args: Any) -> bool:
    """Whether there is nothing within anything."""
    return all(isinstance(x, (Tensor, *PLAIN)) for x in args)


def kind_of(leaves: list[Any]) -> tuple[Hashable, ...]:
    """What has to be the same for the same code: tensors' shapes, dtypes and which of them are one, and all else."""
    numbers: dict[int, int] = {}
    kinds: list[Hashable] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            kinds.append((numbers.setdefault(id(leaf), len(numbers)), leaf.shape, leaf.dtype, leaf.device))
        elif isinstance(leaf, PLAIN):
            kinds.append((type(leaf), repr(leaf)))  # which tells 0.0 and -0.0, 1 and True apart, and nan is nan
        else:
            kinds.append((type(leaf), id(leaf)))  # it is kept, so that the id is its own
    return tuple(kinds)
