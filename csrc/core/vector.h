// Vectors of numbers, generic over their width: GCC's and Clang's vector extensions, and the scalar beside them.
//
// R below is float, double, or a vector of either: `x + y`, `x < y`, `mask ? x : y` mean the same for all of them, lane
// by lane. Where the operators end, this header goes on. Each function gives the same bits for every width and
// instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "common.h"

namespace pyode {
inline namespace PYODE_LEVEL {

template <class T, int Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
};
/// As many T as fit into a register of so many bytes: 16 (SSE, Neon), 32 (AVX), 64 (AVX-512).
template <class T, int Bytes>
using Vector = typename VectorOf<T, Bytes>::type;

template <class R, class = void>
struct LanesOf {  // a vector's comparisons are integers: 0 or -1
  using Number = std::decay_t<decltype(std::declval<R&>()[0])>;
  using Integer = decltype(std::declval<R>() < std::declval<R>());
  using Mask = Integer;
};
template <class R>
struct LanesOf<R, std::enable_if_t<std::is_arithmetic<R>::value>> {
  using Number = R;
  using Integer = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;
  using Mask = bool;
};

template <class R>
using number_t = typename LanesOf<R>::Number;
/// Integers as wide as the numbers: what their bits are read as.
template <class R>
using integer_t = typename LanesOf<R>::Integer;
/// What a comparison gives.
template <class R>
using mask_t = typename LanesOf<R>::Mask;

template <class R>
constexpr bool is_vector = !std::is_arithmetic<R>::value;
template <class R>
constexpr bool is_single = std::is_same<number_t<R>, float>::value;
template <class R>
constexpr int lanes = static_cast<int>(sizeof(R) / sizeof(number_t<R>));

/// x in every lane.
template <class R>
PYODE_HD R broadcast(number_t<R> x) {
  if constexpr (is_vector<R>)
    return x - R{};  // x - 0 is x, also for -0: no instruction is spent on it
  else
    return x;
}

template <class To, class From>
PYODE_HD To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

/// mask ? a : b.
template <class R>
PYODE_HD R select(mask_t<R> mask, R a, R b) {
  return mask ? a : b;
}

template <class R>
PYODE_HD R abs(R x) {
  constexpr number_t<integer_t<R>> sign = std::numeric_limits<number_t<integer_t<R>>>::min();
  return bit_cast<R>(bit_cast<integer_t<R>>(x) & ~sign);
}

/// The magnitude of x with the sign of y.
template <class R>
PYODE_HD R copysign(R x, R y) {
  constexpr number_t<integer_t<R>> sign = std::numeric_limits<number_t<integer_t<R>>>::min();
  return bit_cast<R>((bit_cast<integer_t<R>>(x) & ~sign) | (bit_cast<integer_t<R>>(y) & sign));
}

/// The integer in every lane converted to the nearest number; a number's fraction cut off.
template <class To, class From>
PYODE_HD To convert(From x) {
  if constexpr (is_vector<From>)
    return __builtin_convertvector(x, To);
  else
    return static_cast<To>(x);
}

// A loop over the lanes would do, but compilers unroll it before they vectorise it, and <immintrin.h> costs as much
// time to compile as a user's whole dynamics.
#if defined(__has_builtin)
#if __has_builtin(__builtin_elementwise_fma) && __has_builtin(__builtin_elementwise_sqrt)
#define PYODE_ELEMENTWISE
#endif
#endif

/// a * b + c, rounded once.
template <class R, class = std::enable_if_t<is_vector<R>>>
PYODE_HD R fused_multiply_add(R a, R b, R c) {
#if defined(PYODE_ELEMENTWISE)
  return __builtin_elementwise_fma(a, b, c);
#else
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 64) {
    constexpr int current_rounding = 4;
    if constexpr (is_single<R>)
      return __builtin_ia32_vfmaddps512_mask(a, b, c, -1, current_rounding);
    else
      return __builtin_ia32_vfmaddpd512_mask(a, b, c, -1, current_rounding);
  }
#endif
#if defined(__FMA__)
  if constexpr (sizeof(R) == 32) {
    if constexpr (is_single<R>)
      return __builtin_ia32_vfmaddps256(a, b, c);
    else
      return __builtin_ia32_vfmaddpd256(a, b, c);
  }
  if constexpr (sizeof(R) == 16) {
    if constexpr (is_single<R>)
      return __builtin_ia32_vfmaddps(a, b, c);
    else
      return __builtin_ia32_vfmaddpd(a, b, c);
  }
#endif
  R result;
  for (int i = 0; i < lanes<R>; ++i) result[i] = fused_multiply_add(a[i], b[i], c[i]);
  return result;
#endif
}

}  // namespace PYODE_LEVEL
}  // namespace pyode
