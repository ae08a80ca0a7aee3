"""The order and the size of the next step of the variable-coefficient Adams method.

The strategy is that of Shampine and Gordon's STEP (Computer Solution of Ordinary Differential Equations, 1975, chapter
10): begin at order 1 and raise order and step size together until that no longer pays; from then on change the order
by one where the error estimates of its neighbours say so, and double the step size, keep it, or shrink it.
"""

from __future__ import annotations

import math

from .._ops.contract import Policy

# Tolerances: the error of a step that is 1 / safety times as long as the one chosen. Shampine and Gordon choose half a
# tolerance in the Euclidean norm, which in the root mean square of three numbers is this.
AIM = 0.3
GROWTH = 2.0  # of a step; with more the formulas of high orders are not stable
KEPT = 2  # steps with an order before a higher one is considered


class Strategy:
    """Chooses from the errors of the step before, in tolerances: its own, and what they would be at other orders.

    Of `lower` errors the first is that of the next order below, the second of the one below that, as far as there are
    such orders.

    Args:
        policy: its safety, ifactor and dfactor.
        max_order: the highest order that there is.
        size: of the first step, signed.

    Attributes:
        order, size: of the next step.
        non_finite: whether the last step was rejected because it was not finite.
    """

    def __init__(self, policy: Policy, max_order: int, size: float) -> None:
        self.policy, self.max_order, self.size = policy, max_order, size
        self.order, self.non_finite = 1, False
        self._climbing, self._kept, self._failures = True, 0, 0

    def reject(self, error: float, lower: list[float]) -> None:
        """Plans the next attempt at a step: smaller, of a lower order if that is better, of order 1 after three."""
        self._failures += 1
        self.non_finite = not math.isfinite(error)
        self._climbing, self._kept = False, 0
        if self._wants_lower(error, lower):
            self.order, error = self.order - 1, lower[0]
        factor = self.policy.dfactor if self.non_finite else self._factor(error)
        if self._failures >= 3:
            self.order = 1
        self.size *= min(factor, 0.5)

    def accept(self, error: float, lower: list[float], higher: float) -> None:
        """Plans the step behind one with this error; that of the next higher order is inf if it is not known."""
        k, self._failures, self.non_finite = self.order, 0, False
        lowers = self._wants_lower(error, lower)
        if self._climbing and not lowers and k < self.max_order:
            self.order, self.size = k + 1, self.size * min(GROWTH, self.policy.ifactor)
            return
        self._climbing = False
        if not lowers and self._kept >= KEPT and higher < math.inf:
            lowers = k > 1 and lower[0] <= min(error, higher)
            if not lowers and k < self.max_order and higher < (error if k > 1 else error / 2):
                self.order, error = k + 1, higher
        if lowers:
            self.order, error = k - 1, lower[0]
        self._kept = self._kept + 1 if self.order == k else 0
        self.size *= self._factor(error)

    def _wants_lower(self, error: float, lower: list[float]) -> bool:
        """Whether the errors of the next orders below are no larger; order 1 has to be much better than order 2."""
        return bool(lower) and max(lower) <= (error if len(lower) == 2 else error / 2)

    def _factor(self, error: float) -> float:
        """By how much to change the step size: often not at all, as then the formulas stay the same."""
        policy, exponent = self.policy, self.order + 1
        aim, growth = AIM * policy.safety**exponent, min(GROWTH, policy.ifactor)
        if error * growth**exponent <= aim:
            return growth
        return 1.0 if error <= aim else max(policy.dfactor, min(0.9, (aim / error) ** (1 / exponent)))
