// sin, cos and tan of float, double, and vectors of either.
#pragma once

#include "vector.h"

namespace pyode {
inline namespace PYODE_LEVEL {
namespace math {

/// x = n pi / 2 + r + low with |r| <= pi / 4, or barely more, and |low| at most half an ulp of r.
template <class R>
struct ByHalfPi {
  R r, low;
  integer_t<R> n;  // modulo 4
};

/// For any finite x from 1 on, with 128 bits of x 2 / pi behind the multiples of 4, which are not computed (Payne and
/// Hanek 1983).
inline ByHalfPi<double> reduce_large_by_half_pi(double x) {
  static constexpr uint64_t two_over_pi[] = {// after a word of zeros the bits behind the binary point
                                             0,
                                             0xa2f9836e4e441529,
                                             0xfc2757d1f534ddc0,
                                             0xdb6295993c439041,
                                             0xfe5163abdebbc561,
                                             0xb7246e3a424dd2e0,
                                             0x06492eea09d1921c,
                                             0xfe1deb1cb129a73e,
                                             0xe88235f52ebb4484,
                                             0xe99c7026b45f7e41,
                                             0x3991d639835339f4,
                                             0x9c845f8bbdf9283b,
                                             0x1ff897ffde05980f,
                                             0xef2f118b5a0a6d1f,
                                             0x6d367ecf27cb09b7,
                                             0x4f463f669e5fea2d,
                                             0x7527bac7ebe5f17b,
                                             0x3d0739f78a5292ea,
                                             0x6bfb5fb11f8d5d08,
                                             0x56033046fc7b6bab,
                                             0xf0cfbc209af4361d};
  __extension__ typedef unsigned __int128 Wide;
  const uint64_t bits = bit_cast<uint64_t>(x);
  const uint64_t significand = (bits & 0xfffffffffffff) | 0x10000000000000;
  // x = significand 2^exponent: of 2 / pi what is worth 2^(2 - exponent) and more gives multiples of 4.
  const int exponent = static_cast<int>(bits >> 52) - 1075, first = exponent - 2 + 64;
  const auto word = [&](int i) {
    const uint64_t* const w = two_over_pi + first / 64 + i;
    return first % 64 == 0 ? w[0] : w[0] << first % 64 | w[1] >> (64 - first % 64);
  };
  const Wide turns = (static_cast<Wide>(significand * word(0)) << 64) + static_cast<Wide>(significand) * word(1) +
                     (static_cast<Wide>(significand) * word(2) >> 64);  // in units of 2^-126 quarters, modulo 4
  const auto n = static_cast<int64_t>((turns + (static_cast<Wide>(1) << 125)) >> 126);
  __extension__ const auto rest = static_cast<__int128>(turns - (static_cast<Wide>(n) << 126));
  const double high = static_cast<double>(rest);
  __extension__ const double low = static_cast<double>(rest - static_cast<__int128>(high));
  constexpr double half_pi = 0x1.921fb54442d18p-126, half_pi_low = 0x1.1a62633145c07p-180;
  const double r = high * half_pi;
  return {r, fused_multiply_add(high, half_pi, -r) + (high * half_pi_low + low * half_pi), n};
}

/// For x >= 0. Cody and Waite's reduction by pi / 2 as a sum of three numbers: n times the first is exactly subtracted.
template <class R>
PYODE_HD ByHalfPi<R> reduce_by_half_pi(R x) {
  using T = number_t<R>;
  constexpr T p0 = is_single<R> ? T(0x1.921fb6p+0) : T(0x1.921fb54442d18p+0);
  constexpr T p1 = is_single<R> ? T(-0x1.777a5cp-25) : T(0x1.1a62633145c07p-54);
  constexpr T p2 = is_single<R> ? T(-0x1.ee59dap-50) : T(-0x1.f1976b7ed8fbcp-110);
  constexpr T two_over_pi = is_single<R> ? T(0x1.45f306p-1) : T(0x1.45f306dc9c883p-1);
  constexpr T most = is_single<R> ? T(0x1p17) : T(0x1p25);
  const R round = broadcast<R>(Format<R>::round);
  const R shifted = fused_multiply_add(x, broadcast<R>(two_over_pi), round), n = shifted - round;
  const R rest = fused_multiply_add(n, broadcast<R>(-p0), x), second = n * p1;
  const R sum = rest - second;
  const R lost = (rest - sum) - second - fused_multiply_add(n, broadcast<R>(p1), -second) - n * p2;
  const R r = sum + lost;
  ByHalfPi<R> reduced = {r, (sum - r) + lost, bit_cast<integer_t<R>>(shifted)};
  if (__builtin_expect(any(x > most), 0))
    for (int i = 0; i < lanes<R>; ++i)
      if (lane(x, i) > most) {
        const double huge = lane(x, i);
        const ByHalfPi<double> of_one =
            is_finite(huge) ? reduce_large_by_half_pi(huge) : ByHalfPi<double>{huge - huge, 0, 0};
        const T high = static_cast<T>(of_one.r);
        set_lane(reduced.r, i, high);
        set_lane(reduced.low, i, static_cast<T>(of_one.r - high + of_one.low));
        set_lane(reduced.n, i, static_cast<number_t<integer_t<R>>>(of_one.n));
      }
  return reduced;
}

/// sin(r) - r for |r| <= pi / 4; float 2^-27, double 2^-57.
template <class R>
PYODE_HD R sin_tail(R r, R low) {
  const R z = r * r;
  R tail;
  if constexpr (is_single<R>)
    tail = polynomial(z, -1.6666655e-1f, 8.33216e-3f, -1.9515218e-4f);
  else
    tail = polynomial(z, -0.1666666666666663, 0.008333333333322108, -0.00019841269829580193, 2.7557313618025437e-06,
                      -2.5050747219335912e-08, 1.5896197698572727e-10);
  return fused_multiply_add(r * z, tail, low);
}

/// cos(r) - 1 for |r| <= pi / 4; float 2^-33, double 2^-63.
template <class R>
PYODE_HD R cos_tail(R r, R low) {
  const R z = r * r;
  R tail;
  if constexpr (is_single<R>)
    tail = polynomial(z, -0.5f, 4.1666646e-2f, -1.3887315e-3f, 2.4433084e-5f);
  else
    tail = polynomial(z, -0.5, 0.041666666666666595, -0.001388888888887304, 2.480158728884149e-05,
                      -2.755731417626318e-07, 2.0875700419009022e-09, -1.1358514094306426e-11);
  return fused_multiply_add(z, tail, -r * low);
}

/// sin(r + low + n pi / 2).
template <class R>
PYODE_HD R sin_reduced(const ByHalfPi<R>& x, integer_t<R> n) {
  const R y = select((n & 1) != 0, 1 + cos_tail(x.r, x.low), x.r + sin_tail(x.r, x.low));
  return flip_sign(y, shift_left<R>(n >> 1, 8 * sizeof(number_t<R>) - 1));
}

template <class R>
PYODE_HD R sin(R x) {
  const auto reduced = reduce_by_half_pi(abs(x));
  return flip_sign(sin_reduced(reduced, reduced.n), bit_cast<integer_t<R>>(x));
}

template <class R>
PYODE_HD R cos(R x) {
  const auto reduced = reduce_by_half_pi(abs(x));
  return sin_reduced(reduced, reduced.n + 1);
}

/// sin(x) / cos(x), each as a sum of two numbers.
template <class R>
PYODE_HD R tan(R x) {
  const auto [r, low, n] = reduce_by_half_pi(abs(x));
  const R s_tail = sin_tail(r, low), c_tail = cos_tail(r, low);
  const R s = r + s_tail, s_low = s_tail - (s - r);
  const R c = 1 + c_tail, c_low = c_tail - (c - 1);
  const auto odd = (n & 1) != 0;
  const R above = select(odd, c, s), above_low = select(odd, c_low, s_low);
  const R below = select(odd, s, c), below_low = select(odd, s_low, c_low);
  const R reciprocal = 1 / below, y = above * reciprocal;
  const R rest = fused_multiply_add(-y, below, above) + fused_multiply_add(-y, below_low, above_low);
  const auto sign = shift_left<R>(n, 8 * sizeof(number_t<R>) - 1) ^ bit_cast<integer_t<R>>(x);
  return flip_sign(fused_multiply_add(rest, reciprocal, y), sign);
}

}  // namespace math
}  // namespace PYODE_LEVEL
}  // namespace pyode
