"""From the user's tolerances, times and options to what the loops and the controller take."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ._ops.contract import REAL, Grid, Policy, clock_device, wide_dtype
from .errors import InvalidType, InvalidValue, warn
from .methods import NAMES_IN_WARNINGS, Method
from .methods.external import ScipySolver
from .solution import Stats
from .state import Form

ADAPTIVE_OPTIONS = frozenset(
    [
        "first_step",
        "min_step",
        "max_step",
        "safety",
        "ifactor",
        "dfactor",
        "max_num_steps",
        "dtype",
        "norm",
        "step_t",
        "jump_t",
        "check_every",
    ]
)
FIXED_STEP_OPTIONS = frozenset(["step_size", "grid_constructor", "interp", "perturb", "norm"])
COMMON_OPTIONS = frozenset(
    ["stats", "on_failure", "event_t_max", "skip_initial_event", "params", "control", "compile", "device_loop"]
)
CONTROLS = ("joint", "per_sample")
# Exponents of the last errors, in units of 1 / order, and of the last ratios of step sizes: I is elementary control; PI
# is PI.4.2, H211b has b = 4 (Soderlind 2003 and 2006); PID is SUNDIALS' (Hindmarsh et al. 2005).
CONTROLLERS = {
    "I": ((1.0, 0.0, 0.0), (0.0, 0.0)),
    "PI": ((0.6, -0.2, 0.0), (0.0, 0.0)),
    "PID": ((0.58, -0.21, 0.1), (0.0, 0.0)),
    "H211b": ((0.25, 0.25, 0.0), (0.25, 0.0)),
}
STEPS_TO_EVENT = 100_000  # at most so many, by default
ENDLESS = 1e30  # the time up to which is searched: finite, so that a solve at rest, whose steps only grow, gets there


def check_dict(options: Any, name: str) -> dict[str, Any]:
    """Raises InvalidType unless options are a dict."""
    if not isinstance(options, dict):
        raise InvalidType(f"{name} must be a dict of options, not a {type(options).__name__}")
    return options


def check_options(options: dict[str, Any], method: Method, strict: bool = False) -> None:
    """Warns of options that the method does not know, as torchdiffeq does; raises InvalidValue where `strict`."""
    if not options:
        return
    norm = options.get("norm")
    if norm is not None and not callable(norm):
        raise InvalidType(f"options['norm'] must be callable as norm(state), not a {type(norm).__name__}")
    stats = options.get("stats")
    if stats is not None and not isinstance(stats, Stats):
        raise InvalidType(f"options['stats'] must be a pyode.Stats, not a {type(stats).__name__}")
    if options.get("on_failure", "raise") not in ("raise", "return"):
        raise InvalidValue(f"options['on_failure'] must be 'raise' or 'return', not {options['on_failure']!r}")
    dtype = options.get("dtype", torch.float64)
    if not isinstance(dtype, torch.dtype):
        raise InvalidType(f"options['dtype'] must be a torch.dtype, not a {type(dtype).__name__}")
    if not dtype.is_floating_point:
        raise InvalidValue(f"options['dtype'] must be real and floating, not {dtype}; it is that of time")
    known = COMMON_OPTIONS | method.options
    if not isinstance(method, ScipySolver):
        known |= ADAPTIVE_OPTIONS if method.adaptive else FIXED_STEP_OPTIONS
    unknown = {name: value for name, value in options.items() if name not in known}
    if unknown and strict:
        raise InvalidValue(f"options has {', '.join(unknown)}; {method.name} knows {', '.join(sorted(known))}")
    if unknown:
        name = NAMES_IN_WARNINGS.get(method.name, method.name)
        warn(f"{name}: Unexpected arguments {unknown}; {method.name} knows {', '.join(sorted(known))}")


def single_time(t: Any, name: str) -> Tensor:
    """A time that is a number, then float64, or a tensor of one, as a 0-dim tensor."""
    try:
        given = t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=torch.float64, device="cpu")
        return given.reshape(())
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidType(f"{name} must be a number or a tensor of one number, not {t!r}") from error


@dataclass(eq=False)
class Times:
    """The output times: the user's tensor, and their values as float64 on the host."""

    tensor: Tensor
    values: list[float]

    @property
    def sign(self) -> float:
        """+1 where time runs forwards, -1 where backwards."""
        return -1.0 if self.values[-1] < self.values[0] else 1.0

    @property
    def unread(self) -> bool:
        """Whether nobody has looked at the values yet, which are a device's."""
        return False

    def in_tensor(self, tensor: Tensor) -> Times:
        """The same times in another tensor."""
        return Times(tensor, self.values)

    def check(self) -> None:
        """Raises InvalidValue where they are wrong; this waits for the device if they are unread."""

    def __len__(self) -> int:
        return len(self.tensor)


class UnreadTimes(Times):
    """Those of a tensor on a GPU, which are read, and checked, when somebody looks at their values.

    Args:
        tensor: the user's.
        check: what checks them.
    """

    def __init__(self, tensor: Tensor, check: Callable[[Tensor], Times]) -> None:
        self.tensor, self._check = tensor, check

    @cached_property
    def values(self) -> list[float]:  # type: ignore[override]
        """See Times."""
        return self._check(self.tensor).values

    @property
    def unread(self) -> bool:
        """See Times."""
        return "values" not in self.__dict__

    def in_tensor(self, tensor: Tensor) -> Times:
        """See Times."""
        return UnreadTimes(tensor, self._check) if self.unread else super().in_tensor(tensor)

    def check(self) -> None:
        """See Times."""
        len(self.values)


def in_order(t: Tensor) -> Tensor:
    """Whether times, [T] or [T, B] float64, are what `check_times` or `check_sample_times` take: [] on their device."""
    steps = t.diff(dim=0) * torch.sign(t[-1] - t[0])
    padding = (t[1:] == t[-1]) & (steps == 0) & (t.dim() == 2)
    return t.isfinite().all() & ((steps > 0) | padding).all()


def check_times(t: Any, late: bool = False) -> Times:
    """Raises InvalidType or InvalidValue unless t is a 1-D floating tensor, strictly monotonic.

    Where it is to be `late`, its values are left unread.
    """
    if not isinstance(t, Tensor):
        raise InvalidType(f"t must be a tensor, not a {type(t).__name__}: torch.linspace(0., 1., 10), for example")
    if not t.is_floating_point():
        raise InvalidType(f"t must be floating, not {t.dtype}; convert it: t.float()")
    if t.dim() != 1:
        raise InvalidValue(f"t must be 1-D, not of shape {tuple(t.shape)}")
    if len(t) == 0:
        raise InvalidValue("t must not be empty; its first entry is where the solve starts")
    if late:
        return UnreadTimes(t, check_times)
    values = t.detach().tolist()
    times = Times(t, values)
    for i, (a, b) in enumerate(pairwise(values)):
        if not times.sign * (b - a) > 0:
            raise InvalidValue(f"t must be strictly monotonic; t[{i}] = {a:g} is followed by t[{i + 1}] = {b:g}")
    if not all(map(math.isfinite, values)):
        raise InvalidValue("t must be finite")
    return times


def check_sample_times(t: Any, samples: int, late: bool = False) -> Times:
    """The same for each sample's own times, [T, B]: each column strictly monotonic, but for repetitions of its last."""
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.dim() != 2 or t.shape[1] != samples or not len(t):
        what = f"{tuple(t.shape)}, {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
        raise InvalidValue(f"t must be [T] or, with control='per_sample', [T, {samples}] floating; it is {what}")
    if late:
        return UnreadTimes(t, partial(check_sample_times, samples=samples))
    values = t.detach().to(torch.float64)
    if not bool(values.isfinite().all()):
        raise InvalidValue("t must be finite")
    steps = values.diff(dim=0) * torch.sign(values[-1] - values[0])
    padding = values[1:] == values[-1]
    wrong = ((steps <= 0) & ~(padding & (steps == 0))).nonzero()
    if len(wrong):
        i, b = wrong[0].tolist()
        raise InvalidValue(
            f"each column of t must be strictly monotonic, but for repetitions of its last time; t[{i}, {b}] = "
            f"{values[i, b]:g} is followed by t[{i + 1}, {b}] = {values[i + 1, b]:g}"
        )
    return Times(t, values[:, 0].tolist() if samples else [0.0] * len(t))


def filter_from(controller: Any) -> tuple[tuple[float, float, float], tuple[float, float]]:
    """The exponents of a controller, given by name or as (beta1, beta2, beta3, alpha2, alpha3).

    Source:
        Soderlind, Digital filters in adaptive time-stepping, 2003.
    """
    if isinstance(controller, str) and controller in CONTROLLERS:
        return CONTROLLERS[controller]
    if isinstance(controller, (tuple, list)) and 1 <= len(controller) <= 5:
        with suppress(TypeError, ValueError):
            b1, b2, b3, a2, a3 = (*map(float, controller), *[0.0] * (5 - len(controller)))
            return (b1, b2, b3), (a2, a3)
    names = ", ".join(map(repr, CONTROLLERS))
    raise InvalidValue(f"controller must be one of {names}, or a tuple of one to five exponents, not {controller!r}")


def times_until_event(times: Times, options: dict[str, Any]) -> Times:
    """The start, and the end of the search for an event: options' event_t_max, or ENDLESS."""
    if len(times.values) != 2:
        raise InvalidValue(f"t must have two entries where event_fn is given, not {len(times.values)}")
    start, sign = times.values[0], times.sign
    last = sign * min(sign * number_from(options, "event_t_max", sign * ENDLESS, -math.inf), ENDLESS)
    if not sign * (last - start) > 0:
        raise InvalidValue(f"options['event_t_max'] = {last:g} must lie behind t[0] = {start:g}, on the side of t[1]")
    return Times(torch.cat([times.tensor[:1], times.tensor.new_tensor([last])]), [start, last])


def check_tolerance(tolerance: Any, name: str, form: Form, y0: Tensor) -> float | Tensor:
    """A number, or a contiguous tensor of `wide_dtype` with one for every number of the state, twice if complex."""
    if isinstance(tolerance, float) and 0 <= tolerance < math.inf:
        return tolerance
    tolerance = form.spread(tolerance, name)
    if isinstance(tolerance, Tensor) and tolerance.requires_grad:
        raise InvalidValue(f"{name} cannot require gradient; detach it")
    try:
        each = torch.as_tensor(tolerance, dtype=wide_dtype(y0.device), device=y0.device)
    except (TypeError, ValueError, RuntimeError) as error:
        parts = "" if form.is_tensor else ", or have one for each part of y0, in a structure like y0's"
        raise InvalidType(f"{name} must be a number or a tensor{parts}, not a {type(tolerance).__name__}") from error
    if not bool(torch.all((each >= 0) & (each < math.inf))):
        raise InvalidValue(f"{name} must be finite and not negative, not {tolerance}")
    if each.numel() == 1:
        return float(each)
    try:
        each = each.expand(y0.shape)
    except RuntimeError as error:
        raise InvalidValue(
            f"{name} must be a number or broadcast to the state's shape {tuple(y0.shape)}; it has {tuple(each.shape)}"
        ) from error
    if y0.dtype in REAL:
        each = each.unsqueeze(-1).expand(*y0.shape, 2)
    return each.contiguous()


def number_from(options: dict[str, Any], name: str, default: float, least: float, most: float = math.inf) -> float:
    """An option that is a number between two bounds."""
    value = options.get(name, default)
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise InvalidType(f"options[{name!r}] must be a number, not {value!r}") from error
    if not least <= number <= most:
        bounds = f"between {least:g} and {most:.4g}" if most < math.inf else f"at least {least:g}"
        raise InvalidValue(f"options[{name!r}] must be {'a number' if least == -math.inf else bounds}, not {value!r}")
    return number


def policy_from(options: dict[str, Any], method: Method, *, clip: bool = False, resume: bool = False) -> Policy:
    """The step-size policy that the options ask for."""
    if not options:
        return Policy(order=float(method.order), clip=clip, resume=resume)
    policy = Policy(
        order=float(method.order),
        safety=number_from(options, "safety", 0.9, 0),
        ifactor=number_from(options, "ifactor", 10.0, 1),
        dfactor=number_from(options, "dfactor", 0.2, 0, 1),
        min_step=number_from(options, "min_step", 0.0, 0),
        max_step=number_from(options, "max_step", math.inf, 0),
        max_num_steps=int(number_from(options, "max_num_steps", 2**31 - 1, 0, 2**62)),
        clip=clip,
        resume=resume,
    )
    if policy.min_step > policy.max_step:
        raise InvalidValue(
            f"options['min_step'] = {policy.min_step:g} exceeds options['max_step'] = {policy.max_step:g}"
        )
    return policy


def first_step_from(options: dict[str, Any]) -> float | None:
    """The size of the first step, if the user gave one."""
    if options.get("first_step") is None:
        return None
    size = abs(number_from(options, "first_step", 0.0, -math.inf))
    if size == math.inf:
        raise InvalidValue("options['first_step'] must be finite; options['max_step'] bounds steps that are chosen")
    return size


def grid_from(options: dict[str, Any], times: Times, device: torch.device) -> Grid:
    """The output times and the steps and discontinuities that the options prescribe, sorted."""
    device = clock_device(device)
    values = times.tensor.detach()
    if device.type == "cuda" and values.device.type == "cpu":  # from such memory the copy does not make the host wait
        values = values.to(torch.float64).contiguous().pin_memory().to(device, non_blocking=True)
    else:
        values = values.to(device, torch.float64, copy=True).contiguous()  # the user's may change
    if options.get("step_t") is None and options.get("jump_t") is None:
        return Grid(values)
    stops = {name: _stops(options.get(name), name, times) for name in ("step_t", "jump_t")}
    repeated = sorted(set(stops["step_t"]) & set(stops["jump_t"]))
    for sorted_times in stops.values():
        repeated += [a for a, b in pairwise(sorted_times) if a == b]
        if repeated:
            raise InvalidValue(
                f"`step_t` and `jump_t` must not have any repeated elements between them; {repeated[0]:g} is one"
            )

    def tensor(stops: list[float]) -> Tensor | None:
        return torch.tensor(stops, dtype=torch.float64, device=device) if stops else None

    return Grid(values, tensor(stops["step_t"]), tensor(stops["jump_t"]))


def numbers_of(times: Any) -> list[float]:
    """Times that are numbers or a tensor on any device."""
    times = times.detach().cpu() if isinstance(times, Tensor) else times
    return torch.as_tensor(times, dtype=torch.float64, device="cpu").reshape(-1).tolist()


def _stops(value: Any, name: str, times: Times) -> list[float]:
    """Those after the start, sorted in time's direction; where each sample has its own, all."""
    if value is None:
        return []
    try:
        values = numbers_of(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidType(f"options[{name!r}] must be times, numbers or a tensor, not {value!r}") from error
    if not all(map(math.isfinite, values)):
        raise InvalidValue(f"options[{name!r}] must be finite")
    if times.tensor.dim() == 2:
        return sorted(values)
    sign, start = times.sign, times.values[0]
    return sorted((v for v in values if sign * (v - start) >= 0), reverse=sign < 0)
