"""pyode.compile: what stands for a func whose solves are native calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import CompileError, InvalidType, InvalidValue, warn
from ..methods import Tableau
from ..state import with_args
from ..tree import Tree
from .arguments import Slots, WithArgs, is_flat, kind_of
from .guards import Guards

if TYPE_CHECKING:
    from .entry import Entry
    from .native import Library

DTYPES = (torch.float32, torch.float64)
MOST_KINDS_OF_ARGS = 32  # for which code is kept


class CompiledDynamics(nn.Module):
    """A func that solves with explicit Runge-Kutta methods as one native call, and can do all that the func can.

    Made by `pyode.compile`. Called itself, it calls func.
    """

    def __init__(self, func: Callable[..., Any], strict: bool = False, auto: bool = False) -> None:
        super().__init__()
        self.func, self.strict, self.auto = func, strict, auto
        self.costs: dict[Any, tuple[float, float]] = {}  # of solves that `auto` has tried: native, eager
        self._entries: dict[Any, Entry] = {}
        self._distinct: list[Entry] = []
        self._guards: Guards | None = None
        self._refused: dict[Any, str] = {}
        self._with_args: dict[Any, tuple[CompiledDynamics, Slots]] = {}
        self._lock = RLock()
        self.last: object = None  # the last solve, prepared to be done again
        self.last_samples: object = None  # and the last per-sample one

    def __reduce__(self) -> tuple[Any, ...]:  # a copy, or another process, traces anew
        return CompiledDynamics, (self.func, self.strict, self.auto)

    def forward(self, t: Tensor, y: Any, *args: Any) -> Any:
        """func(t, y, *args)."""
        return self.func(t, y, *args)

    def with_args(self, args: Any) -> CompiledDynamics | WithArgs:
        """What solves with further arguments of func: the same code for all tensors of the same shapes and dtypes."""
        if not args:
            return self
        tree = None if is_flat(args) else Tree(tuple(args))
        leaves = list(args) if tree is None else tree.leaves(tuple(args))
        key = (tree and str(tree.spec), *kind_of(leaves))
        with self._lock:
            found = self._with_args.pop(key, None)
            if found is None:
                slots = Slots(self.func, tree, leaves)
                found = CompiledDynamics(slots, self.strict, self.auto), slots
            self._with_args[key] = found  # behind all others
            if len(self._with_args) > MOST_KINDS_OF_ARGS:
                del self._with_args[next(iter(self._with_args))]
        compiled, slots = found
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        given = {id(slot): tensor for slot, tensor in zip(slots.tensors, tensors)}
        return WithArgs(compiled, with_args(self.func, args), given)

    @property
    def source(self) -> str:
        """The C++ of what was compiled last; empty before the first solve."""
        entries = self._all_entries()
        return entries[-1].source if entries else ""

    def _all_entries(self) -> list[Entry]:
        return [*self._distinct, *(entry for other, _ in self._with_args.values() for entry in other._distinct)]

    def entry(
        self, shapes: list[torch.Size], is_tuple: bool, dtype: torch.dtype, method: Tableau, per_sample: bool = False
    ) -> Entry | None:
        """What was compiled for such a state, now if need be; None, after one warning, where that can't be done.

        Raises:
            CompileError: it can't be done, and `strict` is wanted.
        """
        key = (*shapes, is_tuple, dtype, method.name, per_sample)
        if not self.unchanged():
            with self._lock:
                self._entries.clear()
                self._refused.clear()
                self.costs.clear()
                self.last = self.last_samples = None
        found = self._entries.get(key)
        if found is None and key not in self._refused:
            with self._lock:
                before = Guards(self.func, self._guards)
                found = self._entries.get(key) or self._make(key, shapes, is_tuple, dtype, method, per_sample)
                self._distinct = list(dict.fromkeys(self._entries.values()))
                self._guards = Guards(self.func, before)
        return found

    def inputs_of(self, entry: Entry) -> list[Tensor]:
        """The tensors that func uses."""
        return entry.inputs

    def library(self, entry: Entry, wanted: tuple[int, ...] | None) -> Library | None:
        """An entry's library, with gradients to what is wanted, if anything; None, after a warning, if none."""
        if wanted is None:
            return self._built(lambda _: entry.library, entry, None, "")
        return self._built(entry.trained, entry, wanted, "its gradient: ")

    def backsolving(self, entry: Entry, wanted: tuple[int, ...]) -> Library | None:
        """An entry's library of the continuous adjoint, with gradients to some of its inputs; None likewise."""
        return self._built(entry.backsolving, entry, wanted, "its gradient: ")

    def _built(self, make: Callable[[Any], Library], entry: Entry, wanted: Any, what: str) -> Library | None:
        key = entry.origin, wanted
        if key in self._refused:
            return None
        try:
            with self._lock:
                return make(wanted)
        except Exception as error:
            self.refuse(key, what + str(error).splitlines()[0])
            return None

    def pays(
        self, native: Callable[[Tensor], Any], eager: Callable[[Tensor], Any], y0: Tensor, kind: tuple[Any, ...]
    ) -> bool:
        """Whether a native solve is faster than an eager one, measured once for states of about this size.

        Args:
            native, eager: make the loop of a short solve from a state; None where it can't be compiled.
            y0: the state.
            kind: of the solve, beside the state's size and dtype and whether gradients are wanted.
        """
        loop = native(y0)
        if loop is None:
            return False
        wanted = [x for x in (y0, *loop.inputs) if x.requires_grad] if torch.is_grad_enabled() else []
        task = "training" if wanted else "solving"
        key = (*kind, task, y0.dtype, y0.numel().bit_length(), torch.get_num_threads())
        if key not in self.costs:
            self.costs[key] = _seconds(native, y0, wanted), _seconds(eager, y0, wanted)
        found = self.costs[key]
        return found[0] <= found[1]

    def unchanged(self) -> bool:
        """Whether func is as it was when it was traced, but for the values of its tensors."""
        guards = self._guards
        if guards is None:
            return True
        for entry in self._distinct:
            if not entry.fits():
                return False
        return guards.hold()

    def _make(
        self,
        key: Any,
        shapes: list[torch.Size],
        is_tuple: bool,
        dtype: torch.dtype,
        method: Tableau,
        per_sample: bool,
    ) -> Entry | None:
        """An entry that serves states of another number of rows too, or a new one."""
        tails = (*(shape[1:] for shape in shapes), is_tuple, dtype, method.name, per_sample)
        together = all(len(shape) > 0 and shape[0] == shapes[0][0] for shape in shapes)
        entry = self._entries.get(tails) if together else None
        if entry is not None and not entry.serves(shapes[0][0]):
            entry = None
        # Tracing needs parts of torch that take a while to import.
        from .entry import Entry

        try:
            if dtype not in DTYPES:
                raise CompileError(f"a state of {dtype}; there are float32 and float64")
            entry = entry or Entry(self.func, shapes, is_tuple, dtype, method, per_sample)
        except CompileError as error:
            self.refuse(key, str(error))
            return None
        except (
            Exception
        ) as error:  # whatever func or torch raises on fake tensors; run eagerly, func shows what is wrong
            self.refuse(key, f"it can't be traced: {type(error).__name__}: {str(error).splitlines()[0]}")
            return None
        if entry.rows:
            self._entries[tails] = entry
        self._entries[key] = entry
        return entry

    def refuse(self, key: Any, reason: str) -> None:
        """Notes that something runs eagerly, and says so once; raises, if `strict`."""
        if self.strict:
            raise CompileError(reason)
        if reason not in self._refused.values():
            warn(f"{_name(self.func)} is not compiled and runs eagerly: {reason}")
        self._refused[key] = reason

    def __repr__(self) -> str:
        lines = [f"compiled {_name(self.func)}"]
        for entry in self._all_entries():
            n = sum(tensor.numel() for tensor in entry.inputs)
            lines.append(
                f"  operators: {', '.join(dict.fromkeys(entry.operators))}\n"
                f"  tensors read: {len(entry.inputs)}, {n} numbers\n"
                f"  {'rows side by side' if entry.rows else f'the state is one row, because {entry.mixed}'}\n"
                f"  traced and compiled in {entry.seconds:.2f} s"
            )
            sources = [library.path.with_suffix(".cpp") for library in entry.libraries]
            lines += [
                f"  {source}" if source.exists() else "  in no file: the cache can't be written" for source in sources
            ]
        for part in (self, *(other for other, _ in self._with_args.values())):
            lines += [f"  not compiled: {reason}" for reason in dict.fromkeys(part._refused.values())]
            for key, (native, eager) in part.costs.items():
                faster = "compiled" if native <= eager else "eager"
                lines.append(f"  {key}: compiled {1e6 * native:.0f} us, eager {1e6 * eager:.0f} us: {faster}")
        return "\n".join(lines)


def _seconds(make: Callable[[Tensor], Any], y0: Tensor, wanted: list[Tensor]) -> float:
    """The shorter of two runs of a short solve, behind one that warms up; with the gradients that are wanted."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        ys = make(y0).solve(y0)
        if wanted:
            torch.autograd.grad(ys, wanted, torch.ones_like(ys), allow_unused=True)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _name(func: Any) -> str:
    return str(getattr(func, "__qualname__", type(func).__name__))


def compile(func: Callable[..., Any], strict: bool = False, auto: bool = False) -> CompiledDynamics:
    """Returns what stands for func in `odeint` and its kin, and makes a solve one native call.

    func is traced at the first solve, written out as C++ and compiled around the solver's loop. Nothing else changes:
    the same arguments, results to rounding, and in float64 the same steps. What can't be compiled runs as func does.

    Args:
        func: called as func(t, y, *args); see docs/compiled.md for what it may do.
        strict: raise where func can't be compiled, instead of warning and running it eagerly.
        auto: whether the first few steps of the first solve of a kind are taken both ways, and that solve and all like
            it then the faster way. Results may so differ from process to process, by rounding.

    Returns:
        A callable module; its parameters are func's. `print` it to see what was made of func; `source` is the C++.

    Raises:
        InvalidType: func is not callable.
        CompileError: at the first solve, if strict.
    """
    if not callable(func):
        raise InvalidType(f"func must be callable as func(t, y), not a {type(func).__name__}")
    return CompiledDynamics(func, strict, auto)


def compiled_by(option: Any, func: Callable[..., Any]) -> CompiledDynamics | None:
    """What options={"compile": True or "auto"} makes of func: the same for the same one; the last few are remembered.

    Raises:
        InvalidValue: the option is something else.
    """
    if option not in (None, True, False, "auto"):
        raise InvalidValue(f"compile must be True, False or 'auto', not {option!r}")
    if isinstance(func, CompiledDynamics):
        return func
    if not option:
        return None
    try:
        return _compiled_once(func, option == "auto")
    except TypeError:  # it has no hash
        raise InvalidType(f"a {type(func).__name__} can't be hashed: use pyode.compile(func) instead") from None


@lru_cache(maxsize=16)
def _compiled_once(func: Callable[..., Any], auto: bool) -> CompiledDynamics:
    return CompiledDynamics(func, auto=auto)
