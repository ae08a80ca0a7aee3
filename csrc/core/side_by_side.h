// What the controller asks of numbers: of a double, and of vectors of double, samples side by side.
#pragma once

#include "vector_math.h"

namespace pyode {
inline namespace PYODE_LEVEL {

template <class R, class = std::enable_if_t<is_vector<R>>>
PYODE_HD R magnitude(R x) {
  return math::abs(x);
}

/// As many numbers as R holds, side by side in memory. A double is read and written as one: of a memcpy whose alignment
/// it does not see nvcc makes eight loads or stores.
template <class R>
PYODE_HD R read_lanes(const double* from) {
  if constexpr (is_vector<R>) {
    R numbers;
    memcpy(&numbers, from, sizeof numbers);
    return numbers;
  } else {
    return *from;
  }
}
template <class R>
PYODE_HD void write_lanes(double* to, R numbers) {
  if constexpr (is_vector<R>)
    memcpy(to, &numbers, sizeof numbers);
  else
    *to = numbers;
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

/// A step of Halley's method for y^-n = x: of y's relative error it leaves the third power, (n + 1) (2 n + 1) / 6
/// times.
template <class R>
PYODE_HD R improve_inverse_root(R y, R x, int n) {
  R power = y;
  for (int rest = n;; power *= power) {
    if (rest & 1) x *= power;
    rest >>= 1;
    if (rest == 0) break;
  }
  const number_t<R> share = 1 / static_cast<number_t<R>>(n);
  const R residual = 1 - x;
  return fused_multiply_add(y * residual, share + residual * ((1 + share) * share / 2), y);
}

/// x to the power of -1 / n, for x > 0 and finite. Roots of whole order are guessed in single precision, within 6 %,
/// from the bits of x, which are about its logarithm, and improved three times, at last in double.
template <class R>
PYODE_HD R inverse_root(R x, double order) {
  const int n = static_cast<int>(order);
  if (n < 1 || n > 12 || n != order) return power(x, -1 / order - R{});
  using Single = single_t<R>;
  using Bits = integer_t<Single>;
  const float share = 1 / static_cast<float>(n);
  const Single single = math::convert<Single>(x), bits = math::convert<Single>(math::bit_cast<Bits>(single));
  const Single guess = math::bit_cast<Single>(math::convert<Bits>(126.95f * 0x1p23f * (1 + share) - share * bits));
  const Single root = improve_inverse_root(improve_inverse_root(guess, single, n), single, n);
  const R result = improve_inverse_root(math::convert<R>(root), x, n);
  const auto beyond = (x > 0) & ((x < 1e-30) | ((x > 1e30) & (x - x == 0)));  // what single precision can hold
  if (!any(beyond)) return result;
  return beyond ? power(x, -1 / order - R{}) : result;  // a sample's bits do not depend on its neighbours
}

template <class R, class = std::enable_if_t<is_vector<R>>>
PYODE_HD R read_at(const double* from, integer_t<R> i) {
#if defined(__AVX512F__) && !defined(__clang__)
  if constexpr (lanes<R> == 8) return __builtin_ia32_gatherdiv8df(R{}, from, (Vector<long long, 64>)i, -1, 8);
#endif
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
