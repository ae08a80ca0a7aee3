// What controller.h asks of numbers, for vectors of double: samples side by side. To be included before it.
#pragma once

#include "vector_math.h"

namespace pyode {
inline namespace PYODE_LEVEL {

template <class R, class = std::enable_if_t<is_vector<R>>>
PYODE_HD R magnitude(R x) {
  return math::abs(x);
}

/// x to the power of y, for what takes no more than the controller's accuracy: within some ulp times |y log(x)|.
template <class R, class = std::enable_if_t<is_vector<R>>>
PYODE_HD R power(R x, R y) {
  return math::exp(y * math::log(x));
}

template <class R, class = std::enable_if_t<is_vector<R>>>
PYODE_HD R read_at(const double* from, integer_t<R> i) {
  R numbers;
  for (int l = 0; l < lanes<R>; ++l) numbers[l] = from[i[l]];
  return numbers;
}

/// Every number rounded to those of To, then its neighbour in the direction of its sign (none where that is 0).
template <class To, class R, class = std::enable_if_t<is_vector<R>>>
PYODE_HD To round_and_nudge(R x, integer_t<R> sign) {
  using Bits = integer_t<To>;
  const To rounded = math::convert<To>(x);
  const Bits direction = math::convert<Bits>(sign), bits = math::bit_cast<Bits>(rounded);
  const Bits next = bits + ((direction > 0) ^ (rounded < 0) ? Bits{} + 1 : Bits{} - 1);
  const Bits least = direction > 0 ? Bits{} + 1 : Bits{} + (math::kSign<To> | 1);
  return direction == 0 ? rounded : math::bit_cast<To>(rounded == 0 ? least : next);
}

}  // namespace PYODE_LEVEL
}  // namespace pyode
