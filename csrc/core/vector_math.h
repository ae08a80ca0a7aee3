// Elementary functions of vectors: exp, tanh and the rest, for float, double and vectors of either.
//
// No tables and no branches but where noted; the same bits for every width and instruction set. Polynomials are
// minimax for the relative error of the result (Remez).
#pragma once

#include "vector.h"

namespace pyode {
inline namespace PYODE_LEVEL {
namespace math {

/// c0 + c1 x + c2 x^2 + ..., by Horner's rule.
template <class R, class T>
PYODE_HD R polynomial(R, T c0) {
  return broadcast<R>(c0);
}
template <class R, class T, class... Ts>
PYODE_HD R polynomial(R x, T c0, Ts... c) {
  return fused_multiply_add(x, polynomial(x, c...), broadcast<R>(c0));
}

/// What IEEE 754 says about the type.
template <class R>
struct Format {
  static constexpr int digits = is_single<R> ? 23 : 52;  // of the fraction
  static constexpr int bias = is_single<R> ? 127 : 1023;
  // Added to a number below 2^(digits - 1), it rounds it to an integer, which the low bits then show.
  static constexpr number_t<R> round = is_single<R> ? number_t<R>(0x1.8p23) : number_t<R>(0x1.8p52);
};

/// 2^n for -bias < n <= bias + 1 (there inf).
template <class R>
PYODE_HD R power_of_two(integer_t<R> n) {
  return bit_cast<R>((n + Format<R>::bias) << Format<R>::digits);
}

/// x = n log(2) / scale + r with |r| <= log(2) / (2 scale) (Cody and Waite 1980: log(2) as a sum of two numbers).
template <class R>
struct Reduced {
  R r;
  integer_t<R> n;
};
template <int scale = 1, class R>
PYODE_HD Reduced<R> reduce_by_log2(R x) {
  using T = number_t<R>;
  constexpr T log2e = is_single<R> ? T(0x1.715476p+0) : T(0x1.71547652b82fep+0);
  constexpr T high = is_single<R> ? T(0x1.62e43p-1) : T(0x1.62e42fefa39efp-1);
  constexpr T low = is_single<R> ? T(-0x1.05c610p-29) : T(0x1.abc9e3b39803fp-56);
  const R round = broadcast<R>(Format<R>::round);
  const R shifted = fused_multiply_add(x, broadcast<R>(scale * log2e), round);
  const R n = shifted - round;
  const R r = fused_multiply_add(n, broadcast<R>(-low / scale), fused_multiply_add(n, broadcast<R>(-high / scale), x));
  return {r, bit_cast<integer_t<R>>(shifted) - bit_cast<integer_t<R>>(round)};
}

/// exp(r) - 1 for |r| <= log(2) / 2.
template <class R>
PYODE_HD R expm1_reduced(R r) {
  R tail;  // relative error of the result 2^-26 and 2^-55
  if constexpr (is_single<R>)
    tail = polynomial(r, 0.5f, 1.6666543e-1f, 4.166628e-2f, 8.366584e-3f, 1.3946452e-3f);
  else
    tail = polynomial(r, 0.5, 0.16666666666666685, 0.04166666666657362, 0.008333333333314602, 0.0013888888932379986,
                      0.0001984126990300557, 2.4801504444709947e-05, 2.755722797817142e-06, 2.7626326968741045e-07,
                      2.5114464904105016e-08);
  return fused_multiply_add(r * r, tail, r);
}

/// exp(x).
template <class R>
PYODE_HD R exp(R x) {
  // Beyond these the result is inf or 0; a nan passes both.
  const R high = broadcast<R>(is_single<R> ? 89 : 710), low = broadcast<R>(is_single<R> ? -104 : -746);
  x = select(x > high, high, select(x < low, low, x));
  const auto [r, n] = reduce_by_log2(x);
  // In two steps, since 2^n alone may overflow or be subnormal.
  const auto half = n >> 1;
  return (1 + expm1_reduced(r)) * power_of_two<R>(half) * power_of_two<R>(n - half);
}

/// exp(x) - 1.
template <class R>
PYODE_HD R expm1(R x) {
  const R high = broadcast<R>(is_single<R> ? 89 : 710), low = broadcast<R>(is_single<R> ? -20 : -40);
  const R clamped = select(x > high, high, select(x < low, low, x));
  const auto [r, n] = reduce_by_log2(clamped);
  // 2^n (exp(r) - 1) + (2^n - 1), where 2^n itself may be inf: half of it, then.
  const auto one = n >> (is_single<R> ? 7 : 10);
  const R scale = power_of_two<R>(n - one);
  const R y = fused_multiply_add(scale, expm1_reduced(r), scale - power_of_two<R>(-one));
  return copysign(y * power_of_two<R>(one), x);
}

/// tanh(x).
template <class R>
PYODE_HD R tanh(R x) {
  const R size = abs(x), end = broadcast<R>(is_single<R> ? 10 : 20);  // from here on 1
  const R square = size * size;
  R tail;  // of tanh(x) = x + x^3 tail(x^2); relative error of the result 2^-29 and 2^-60
  if constexpr (is_single<R>)
    tail = polynomial(square, -3.3333316e-1f, 1.3332576e-1f, -5.3851172e-2f, 2.1066658e-2f, -6.2667e-3f);
  else
    tail = polynomial(square, -0.333333333333333, 0.1333333333332639, -0.053968253963622675, 0.021869488381799588,
                      -0.008863232533202614, 0.0035920913231599887, -0.0014555381759198461, 0.0005884247990948585,
                      -0.00023333027421699703, 8.324122601114769e-05, -1.9447206189782416e-05);
  const R small = fused_multiply_add(square * size, tail, size);
  // 1 - 2 / (exp(2 |x|) + 1), which loses no digit once tanh(x) > 1/2.
  const auto [r, n] = reduce_by_log2<2>(select(size > end, end, size));
  const R scale = power_of_two<R>(n);
  const R large = 1 - 2 / (fused_multiply_add(scale, expm1_reduced(r + r), scale) + 1);
  return copysign(select(size < number_t<R>(0.55), small, large), x);
}

/// The logistic function 1 / (1 + exp(-x)).
template <class R>
PYODE_HD R sigmoid(R x) {
  const R power = exp(-abs(x));
  return select(x < 0, power, broadcast<R>(1)) / (1 + power);
}

}  // namespace math
}  // namespace PYODE_LEVEL
}  // namespace pyode
