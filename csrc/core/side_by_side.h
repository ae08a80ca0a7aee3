// What controller.h asks of numbers: of a double, and of vectors of double, samples side by side.
#pragma once

#include "vector_math.h"

namespace pyode {
inline namespace PYODE_LEVEL {

template <class R, class = std::enable_if_t<is_vector<R>>>
PYODE_HD R magnitude(R x) {
  return math::abs(x);
}

/// x to the power of y, for what takes no more than the controller's accuracy: within some ulp times |y log(x)|.
template <class R>
PYODE_HD R power(R x, R y) {
  return math::exp(y * math::log(x));
}

template <class R, class = void>
struct SingleOf {
  using type = float;
};
#if defined(PYODE_VECTORS)
template <class R>
struct SingleOf<R, std::enable_if_t<is_vector<R>>> {
  using type = Vector<float, sizeof(R) / 2>;
};
#endif
/// The numbers of R in single precision.
template <class R>
using single_t = typename SingleOf<R>::type;

/// The same with one exponent for all. An n-th root is guessed in single precision, and made exact by a step of
/// Halley's method for y^-n = x, whose error is the third power of the guess's: that takes half as long as the
/// logarithm.
template <class R>
PYODE_HD R root_power(R x, double y) {
  const int n = static_cast<int>(1 / y + 0.5);
  const auto beyond = (x > 0) & ((x < 1e-30) | ((x > 1e30) & (x - x == 0)));
  if (n < 1 || n > 16 || y * n != 1) return power(x, y - R{});
  using Single = single_t<R>;
  const Single guess = math::exp(static_cast<float>(-y) * math::log(math::convert<Single>(x)));
  R root = math::convert<R>(guess), product = x;  // the reciprocal's root
  for (int i = 0; i < n; ++i) product *= root;
  const R rest = 1 - product;
  root = fused_multiply_add(root * rest, y + rest * ((n + 1) * y * y / 2), root);
  R result = x;
  for (int i = 1; i < n; ++i) result *= root;
  if (any(beyond)) result = beyond ? power(x, y - R{}) : result;  // a sample's bits do not depend on its neighbours
  return result;
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
