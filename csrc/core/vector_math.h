// Elementary functions of float, double, and vectors of either: exp, log, tanh, sin, erf, pow and the rest.
//
// No tables, no calls, and no branches but for huge arguments of sin, cos and tan; the same bits for every width and
// instruction set (fused multiply-adds are needed for speed: without them each is a call). inf, nan, zeros and
// subnormals as C99's Annex F has them; no floating-point exception is meaningful. Polynomials are minimax for the
// relative error of the result (Remez); what they leave is given as a power of two.
#pragma once

#include "vector.h"
#include "vector_trigonometry.h"

namespace pyode {
inline namespace PYODE_LEVEL {
namespace math {

/// log(2) as a sum of two numbers, and one over it.
template <class T>
struct Log2 {
  static constexpr bool single = sizeof(T) == 4;
  static constexpr T inverse = single ? T(0x1.715476p+0) : T(0x1.71547652b82fep+0);
  static constexpr T high = single ? T(0x1.62e43p-1) : T(0x1.62e42fefa39efp-1);
  static constexpr T low = single ? T(-0x1.05c610p-29) : T(0x1.abc9e3b39803fp-56);
};

/// x = n log(2) + r with |r| <= log(2) / 2 (Cody and Waite 1980).
template <class R>
struct ByLog2 {
  R r;
  integer_t<R> n;
};
template <class R>
PYODE_HD ByLog2<R> reduce_by_log2(R x) {
  using Two = Log2<number_t<R>>;
  const R round = broadcast<R>(Format<R>::round);
  const R shifted = fused_multiply_add(x, broadcast<R>(Two::inverse), round), n = shifted - round;
  const R rest = fused_multiply_add(n, broadcast<R>(-Two::high), x);
  return {fused_multiply_add(n, broadcast<R>(-Two::low), rest),
          bit_cast<integer_t<R>>(shifted) - bit_cast<integer_t<R>>(round)};
}

/// x, but no larger and no smaller than what decides a function's value in its type; a nan stays one.
template <class R>
PYODE_HD R between(number_t<R> low, R x, number_t<R> high) {
  return select(x > high, broadcast<R>(high), select(x < low, broadcast<R>(low), x));
}

/// tail in exp(r) - 1 = r + r^2 tail(r) for |r| <= log(2) / 2; float 2^-26, double 2^-55.
template <class R>
PYODE_HD R expm1_tail(R r) {
  if constexpr (is_single<R>)
    return polynomial(r, 0.5f, 1.6666543e-1f, 4.166628e-2f, 8.366584e-3f, 1.3946452e-3f);
  else
    return polynomial(r, 0.5000000000000006, 0.16666666666666685, 0.04166666666657362, 0.008333333333314602,
                      0.0013888888932379986, 0.0001984126990300557, 2.4801504444709947e-05, 2.755722797817142e-06,
                      2.7626326968741045e-07, 2.5114464904105016e-08);
}
template <class R>
PYODE_HD R expm1_reduced(R r) {
  return fused_multiply_add(r * r, expm1_tail(r), r);
}

/// exp(x - low), where low is below an ulp of x.
template <class R>
PYODE_HD R exp_of_difference(R x, R low) {
  const auto [r, n] = reduce_by_log2(is_single<R> ? between<R>(-104, x, 89) : between<R>(-746, x, 710));
  // In two steps, since 2^n alone may overflow or be subnormal.
  const auto half = n >> 1;
  return (1 + expm1_reduced(r - low)) * power_of_two<R>(half) * power_of_two<R>(n - half);
}

template <class R>
PYODE_HD R exp(R x) {
  return exp_of_difference(x, R{});
}

/// exp(x) - 1.
template <class R>
PYODE_HD R expm1(R x) {
  const auto [r, n] = reduce_by_log2(is_single<R> ? between<R>(-20, x, 89) : between<R>(-40, x, 710));
  // 2^n (exp(r) - 1) + (2^n - 1), where 2^n itself may be inf: half of it, then.
  const auto one = n >> (is_single<R> ? 7 : 10);
  const R scale = power_of_two<R>(n - one);
  const R linear = fused_multiply_add(scale, r, scale - power_of_two<R>(-one));
  const R y = fused_multiply_add(scale * (r * r), expm1_tail(r), linear);
  return copysign(y * power_of_two<R>(one), x);
}

template <class R>
PYODE_HD R tanh(R x) {
  using T = number_t<R>;
  const R size = abs(x), square = size * size;
  R tail;  // of tanh(x) = x + x^3 tail(x^2); float 2^-25, double 2^-60
  if constexpr (is_single<R>)
    tail = polynomial(square, -3.3332947e-1f, 1.3320725e-1f, -5.2671812e-2f, 1.6437581e-2f);
  else
    tail = polynomial(square, -0.333333333333333, 0.1333333333332639, -0.053968253963622675, 0.021869488381799588,
                      -0.008863232533202614, 0.0035920913231599887, -0.0014555381759198461, 0.0005884247990948585,
                      -0.00023333027421699703, 8.324122601114769e-05, -1.9447206189782416e-05);
  const R small = fused_multiply_add(square * size, tail, size);

  // 1 - 2 / (exp(2 |x|) + 1), which loses no digit where tanh(x) > 1/2 (from x = 0.5494 on), and hides there most of
  // what exp lacks: |x| = n log(2) / 2 + r needs one subtraction only.
  constexpr T most = is_single<R> ? 10 : 20;
  const R round = broadcast<R>(Format<R>::round + Format<R>::bias);  // the low bits then are 2^n's exponent
  const integer_t<R> bits = bit_cast<integer_t<R>>(size), top = bit_cast<integer_t<R>>(broadcast<R>(most));
  const R bounded = bit_cast<R>(bits < top ? bits : top);  // nan is as large as can be
  const R shifted = fused_multiply_add(bounded, broadcast<R>(2 * Log2<T>::inverse), round);
  const R scale = bit_cast<R>(shift_left<R>(bit_cast<integer_t<R>>(shifted), Format<R>::digits));
  const R r = fused_multiply_add(shifted - round, broadcast<R>(-Log2<T>::high / 2), bounded);
  R power;  // exp(2 r); float 2^-29, double 2^-55
  if constexpr (is_single<R>)
    power = polynomial(r, 1.0f, 2.0f, 1.9999996f, 1.3333136f, 6.6669166e-1f, 2.6799446e-1f, 8.855549e-2f);
  else
    power = polynomial(r, 1.0, 2.0, 2.000000000000002, 1.3333333333333348, 0.6666666666651779, 0.26666666666606725,
                       0.08888888916723191, 0.02539682547584713, 0.006349185137845746, 0.0014109300724823768,
                       0.0002828935881599083, 5.143442412360707e-05);
  const R large = 1 - 2 / fused_multiply_add(scale, power, broadcast<R>(1));
  return copysign(select(size >= T(0.55), large, small), x);
}

/// The logistic function 1 / (1 + exp(-x)).
template <class R>
PYODE_HD R sigmoid(R x) {
  const R power = exp(-abs(x)), sum = 1 + power;
  const R y = select(x < 0, power, broadcast<R>(1)) / sum;
  // What was lost in the sum, times 1 / sum, which is 1 - y where x < 0.
  const R lost = power - (sum - 1);
  return fused_multiply_add(-y, lost * select(x < 0, 1 - y, y), y);
}

/// x > 0 as 2^n (1 + f) with 2/3 <= 1 + f < 4/3; normal.
template <class R>
struct ByPowerOfTwo {
  R f;
  integer_t<R> n;
};
template <class R>
PYODE_HD ByPowerOfTwo<R> reduce_by_power_of_two(R x) {
  constexpr number_t<integer_t<R>> two_thirds = is_single<R> ? 0x3f2aaaab : 0x3fe5555555555555;
  constexpr number_t<integer_t<R>> fraction = (number_t<integer_t<R>>(1) << Format<R>::digits) - 1;
  const integer_t<R> above = bit_cast<integer_t<R>>(abs(x)) - two_thirds;  // of -0 and the like it would overflow
  return {bit_cast<R>((above & fraction) + two_thirds) - 1, above >> Format<R>::digits};
}

/// What a logarithm of x is where reduction says nothing: x is not positive, or inf or nan.
template <class R>
PYODE_HD R log_unless_finite(R x, R y) {
  using Limits = std::numeric_limits<number_t<R>>;
  const R special =
      select(x < 0, broadcast<R>(Limits::quiet_NaN()), select(x == 0, broadcast<R>(-Limits::infinity()), x));
  return select((x > 0) & (x < Limits::infinity()), y, special);
}

/// n log(2) + log(1 + f) for -1/3 <= f < 1/3; float 2^-27, double 2^-59.
template <class R>
PYODE_HD R log_reduced(R f, R n) {
  using Two = Log2<number_t<R>>;
  R tail;  // of log(1 + f) = f + f^2 tail(f)
  if constexpr (is_single<R>)
    tail = polynomial(f, -0.5f, 3.3333215e-1f, -2.4999797e-1f, 2.0010406e-1f, -1.6680487e-1f, 1.400587e-1f,
                      -1.2184263e-1f, 1.3984431e-1f, -1.2891677e-1f);
  else
    tail = polynomial(f, -0.5, 0.3333333333333317, -0.2499999999999944, 0.20000000000073181, -0.16666666666845525,
                      0.14285714274512085, -0.12499999978210909, 0.11111111952616137, -0.1000000138824254,
                      0.09090872994795236, -0.08333280813487554, 0.07693259659910984, -0.0714411096306557,
                      0.06650735631422885, -0.06230656887704608, 0.06051190015560758, -0.05747047098348514,
                      0.04177723165394975, -0.03839009663836025, 0.08495742343174371, -0.08334489623194533);
  const R y = fused_multiply_add(f * f, tail, n * Two::low) + f;
  return fused_multiply_add(n, broadcast<R>(Two::high), y);
}

/// The natural logarithm.
template <class R>
PYODE_HD R log(R x) {
  const auto subnormal = x < std::numeric_limits<number_t<R>>::min();
  constexpr int shift = Format<R>::digits + 1;
  const R normal = select(subnormal, x * number_t<R>(int64_t{1} << shift), x);
  const auto [f, n] = reduce_by_power_of_two(normal);
  return log_unless_finite(x, log_reduced(f, convert<R>(n) - select(subnormal, broadcast<R>(shift), R{})));
}

/// log(1 + x).
template <class R>
PYODE_HD R log1p(R x) {
  const R u = 1 + x;
  const R lost = select(x > 1, 1 - (u - x), x - (u - 1));
  const auto [f, n] = reduce_by_power_of_two(u);
  // Nothing is lost that counts where 2^-n would be subnormal.
  constexpr number_t<integer_t<R>> most = Format<R>::bias - 1;
  const R scale = power_of_two<R>(-(n > most ? integer_t<R>{} + most : n));
  return copysign(log_unless_finite(u, log_reduced(fused_multiply_add(lost, scale, f), convert<R>(n))), x);
}

/// The error function.
template <class R>
PYODE_HD R erf(R x) {
  const R size = abs(x), square = size * size;
  R tail, exponent;  // of erf(x) = x + x tail(x^2), and of 1 - exp(exponent(x)); float 2^-29, double 2^-62
  if constexpr (is_single<R>) {
    tail = polynomial(square, 1.2837917e-1f, -3.7612635e-1f, 1.1283696e-1f, -2.6859391e-2f, 5.2010156e-3f,
                      -8.142512e-4f, 8.369285e-5f);
    exponent = polynomial(between<R>(0, size, 4), -1.9568265e-4f, -1.1276757e+0f, -6.371823e-1f, -1.03931546e-1f,
                          2.2226896e-2f, -3.0432108e-3f, 1.9593655e-4f);
  } else {
    tail = polynomial(square, 0.1283791670955126, -0.3761263890318375, 0.11283791670954851, -0.02686617064507176,
                      0.005223977624769373, -0.0008548326978056268, 0.00012055331011004685, -1.4925592864674702e-05,
                      1.6460962211784025e-06, -1.6349909748628387e-07, 1.4657083766200646e-08, -1.1362517902512842e-09,
                      5.939822785736792e-11);
    exponent = polynomial(between<R>(0, size, 6), -2.72980795400396e-08, -1.1283789208423174, -0.63662070984582,
                          -0.10277088762532728, 0.019128192755040588, 0.00020207914793817473, -0.001674701175467322,
                          0.0005521174655841791, 2.2187026309674077e-05, -0.00011088955749155959, 6.4811626823174e-05,
                          -2.4299662764255646e-05, 6.7901286959911675e-06, -1.4711715229004772e-06,
                          2.48420755695632e-07, -3.223619914291194e-08, 3.112696082826654e-09, -2.108685395043515e-10,
                          8.944928354720365e-12, -1.7874231172066657e-13);
  }
  const R small = fused_multiply_add(size, tail, size);
  const auto [r, n] = reduce_by_log2(exponent);
  const R scale = power_of_two<R>(n);
  const R large = 1 - fused_multiply_add(scale, expm1_reduced(r), scale);
  return copysign(select(size < (is_single<R> ? number_t<R>(0.921875) : 1), small, large), x);
}

/// x >= 0 to the power of y, in double precision: y log(x) as a sum of two numbers (Dekker 1971), within 2^-60.
template <class R>
PYODE_HD R pow_of_magnitude(R x, R y) {
  using Limits = std::numeric_limits<double>;
  const auto subnormal = x < Limits::min();
  const auto [f, binades] = reduce_by_power_of_two(select(subnormal, x * 0x1p53, x));
  const R n = convert<R>(binades) - select(subnormal, broadcast<R>(53), R{});

  // log(1 + f) = 2 s (1 + s^2 (1/3 + s^2 tail(s^2))) with s = f / (2 + f).
  const R d = 2 + f, s = f / d;
  const R s_low = (fused_multiply_add(-s, d, f) - s * (f - (d - 2))) / d;
  const R z = s * s, z_low = fused_multiply_add(s, s, -z) + 2 * s * s_low;
  const R tail = z * polynomial(z, 0.19999999999999862, 0.14285714285789128, 0.1111111109554102, 0.09090910770473318,
                                0.07692202949143838, 0.06670582965152136, 0.057960172601487635, 0.06286719703053867);
  constexpr double third = 0x1.5555555555555p-2, third_low = 0x1.5555555555555p-56;
  const R q = third + tail, q_low = tail - (q - third) + third_low;
  const R c = z * q, c_low = fused_multiply_add(z, q, -c) + z * q_low + z_low * q;
  const R t = 2 * s * c, t_low = fused_multiply_add(2 * s, c, -t) + 2 * s * c_low + 2 * s_low * c;
  const R part = 2 * s + t, part_low = t - (part - 2 * s) + t_low + 2 * s_low;

  constexpr double log2 = 0x1.62e42fefa38p-1, log2_low = 0x1.ef35793c7673p-45;  // n log2 is exact
  const R whole = n * log2;
  const R sum = log_unless_finite(x, whole + part);
  const R low = part - (sum - whole) + fused_multiply_add(n, broadcast<R>(log2_low), part_low);

  const R exponent = y * sum;
  const R exponent_low = fused_multiply_add(y, sum, -exponent) + y * low;
  return exp_of_difference(exponent, select(abs(exponent) < 1000, -exponent_low, R{}));
}

/// x to the power of y.
template <class R>
PYODE_HD R pow(R x, R y) {
  using Limits = std::numeric_limits<number_t<R>>;
  const R size = abs(x);
  R z;
  if constexpr (!is_single<R>) {
    z = pow_of_magnitude(size, y);
  } else if constexpr (is_vector<R>) {  // in double, one half after the other
    using Half = Vector<float, sizeof(R) / 2>;
    using Wide = Vector<double, sizeof(R)>;
    Half base[2], exponent[2], power[2];
    memcpy(base, &size, sizeof size);
    memcpy(exponent, &y, sizeof y);
    for (int i = 0; i < 2; ++i) power[i] = convert<Half>(exp(convert<Wide>(exponent[i]) * log(convert<Wide>(base[i]))));
    memcpy(&z, power, sizeof z);
  } else {
    z = static_cast<float>(exp(y * log(static_cast<double>(size))));
  }
  const R half = y * number_t<R>(0.5);
  const mask_t<R> integer = floor(y) == y, odd = integer & (floor(half) != half);
  z = select((x < 0) & !integer & (size < Limits::infinity()), broadcast<R>(Limits::quiet_NaN()), z);
  z = select(odd, copysign(z, x), z);
  const mask_t<R> one = (x == 1) | (y == 0) | ((size == 1) & (abs(y) == Limits::infinity()));
  return select(one, broadcast<R>(1), z);
}

/// x to a small whole power as torch computes it: x x, x x x, and the reciprocals of these.
template <int N, class R>
PYODE_HD R integer_power(R x) {
  static_assert(N != 0 && N >= -2 && N <= 3, "torch calls pow");
  if constexpr (N < 0)
    return 1 / integer_power<-N>(x);
  else if constexpr (N == 1)
    return x;
  else
    return integer_power<N - 1>(x) * x;
}

}  // namespace math
}  // namespace PYODE_LEVEL
}  // namespace pyode
