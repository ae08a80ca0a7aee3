// What emitted formulas call beside core/vector_math.h.
#pragma once

#include "../core/vector_math.h"

namespace pyode {
inline namespace PYODE_LEVEL {
namespace compiled {

using namespace math;

/// A mask as zeros and ones.
template <class R>
PYODE_HD R indicator(mask_t<R> mask) {
  return mask ? broadcast<R>(1) : R{};
}

/// A truth value as the mask of every lane.
template <class R>
PYODE_HD mask_t<R> spread_mask(bool mask) {
  return broadcast<R>(mask ? 1 : 0) != 0;
}

/// -1, 0, 1 or, as torch has it, 0 for nan.
template <class R>
PYODE_HD R sign(R x) {
  return indicator<R>(x > 0) - indicator<R>(x < 0);
}

/// A function of numbers, lane by lane: for what has no vector form.
template <class R, class Function>
PYODE_HD R by_lane(Function f, R x) {
  number_t<R> numbers[lanes<R>];
  memcpy(numbers, &x, sizeof x);
  for (auto& number : numbers) number = f(number);
  memcpy(&x, numbers, sizeof x);
  return x;
}
template <class R, class Function>
PYODE_HD R by_lane(Function f, R x, R y) {
  number_t<R> numbers[lanes<R>], others[lanes<R>];
  memcpy(numbers, &x, sizeof x);
  memcpy(others, &y, sizeof y);
  for (int l = 0; l < lanes<R>; ++l) numbers[l] = f(numbers[l], others[l]);
  memcpy(&x, numbers, sizeof x);
  return x;
}

#define PYODE_BY_LANE(name, call)                      \
  template <class R>                                   \
  PYODE_HD R name(R x) {                               \
    return by_lane([](auto v) { return call(v); }, x); \
  }
#define PYODE_BY_LANE_2(name, call)                                  \
  template <class R>                                                 \
  PYODE_HD R name(R x, R y) {                                        \
    return by_lane([](auto v, auto w) { return call(v, w); }, x, y); \
  }
PYODE_BY_LANE(exp2, std::exp2)
PYODE_BY_LANE(log2, std::log2)
PYODE_BY_LANE(log10, std::log10)
PYODE_BY_LANE(asin, std::asin)
PYODE_BY_LANE(acos, std::acos)
PYODE_BY_LANE(atan, std::atan)
PYODE_BY_LANE(sinh, std::sinh)
PYODE_BY_LANE(cosh, std::cosh)
PYODE_BY_LANE(asinh, std::asinh)
PYODE_BY_LANE(acosh, std::acosh)
PYODE_BY_LANE(atanh, std::atanh)
PYODE_BY_LANE(erfc, std::erfc)
PYODE_BY_LANE_2(atan2, std::atan2)
PYODE_BY_LANE_2(hypot, std::hypot)
PYODE_BY_LANE_2(fmod, std::fmod)

/// x modulo y, of y's sign, from the exact remainder: as torch and Python have it.
template <class R>
PYODE_HD R remainder(R x, R y) {
  const R rest = fmod(x, y);
  return select((rest != 0) & ((y < 0) != (rest < 0)), rest + y, rest);
}
/// floor(x / y), from the exact remainder: torch's and Python's.
template <class R>
PYODE_HD R floor_divide(R x, R y) {
  const R rest = fmod(x, y), below = indicator<R>((rest != 0) & ((y < 0) != (rest < 0)));
  const R quotient = round((x - rest) / y - below);
  return select(y == 0, x / y, select(quotient == 0, copysign(R{}, x / y), quotient));
}

#undef PYODE_BY_LANE
#undef PYODE_BY_LANE_2

}  // namespace compiled
}  // namespace PYODE_LEVEL
}  // namespace pyode
