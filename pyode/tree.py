"""Nested states: torch's pytrees, with dataclasses in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch.utils import _pytree as pytree


class Tree:
    """How a state is nested: torch's pytrees, and in them dataclasses, by the fields that their constructors take."""

    def __init__(self, state: Any) -> None:
        nodes, self.spec = pytree.tree_flatten(state)
        self.nodes = [_DataclassTree(node) if _is_dataclass_instance(node) else None for node in nodes]
        try:
            self.paths = [pytree.keystr(path) for path, _ in pytree.tree_leaves_with_path(state)]
        except ValueError:  # a class that was registered without the names of its parts
            self.paths = [f"[{i}]" for i in range(len(nodes))]

    def names(self, root: str) -> list[str]:
        """How each leaf is written, given the name of the whole."""
        named = zip(self.paths, self.nodes)
        return [name for path, node in named for name in (node.names(root + path) if node else (root + path,))]

    def leaves(self, state: Any) -> list[Any]:
        """What `state` has in the places of the leaves, in their order.

        Raises:
            ValueError: `state` is of another structure.
        """
        found = zip(self.spec.flatten_up_to(state), self.nodes)
        return [leaf for value, node in found for leaf in (node.leaves(value) if node else (value,))]

    def build(self, leaves: Iterator[Any]) -> Any:
        """The structure with these leaves."""
        return pytree.tree_unflatten((node.build(leaves) if node else next(leaves) for node in self.nodes), self.spec)


def _is_dataclass_instance(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


class _DataclassTree:
    """A dataclass inside a Tree, which torch's pytree takes for a leaf."""

    def __init__(self, instance: Any) -> None:
        self.type = type(instance)
        self.fields = {field.name: Tree(getattr(instance, field.name)) for field in fields(instance) if field.init}

    def names(self, root: str) -> list[str]:
        return [name for field, tree in self.fields.items() for name in tree.names(f"{root}.{field}")]

    def leaves(self, instance: Any) -> list[Any]:
        if type(instance) is not self.type:
            raise ValueError(f"expected a {self.type.__name__}, but got a {type(instance).__name__}")
        return [leaf for name, tree in self.fields.items() for leaf in tree.leaves(getattr(instance, name))]

    def build(self, leaves: Iterator[Any]) -> Any:
        return self.type(**{name: tree.build(leaves) for name, tree in self.fields.items()})
