// Vectors of numbers, generic over their width: GCC's and Clang's vector extensions, and the scalar beside them.
//
// R below is float, double, or a vector of either: `x + y`, `x < y`, `mask ? x : y` mean the same for all of them, lane
// by lane. Where the operators end, this header goes on. Each function gives the same bits for every width and
// instruction set. To be included before step.h, whose templates then take vectors.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "common.h"

namespace pyode {
inline namespace PYODE_LEVEL {

#if defined(__GNUC__)
#define PYODE_VECTORS
template <class T, int Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
};
/// As many T as fit into a register of so many bytes: 16 (SSE, Neon), 32 (AVX), 64 (AVX-512).
template <class T, int Bytes>
using Vector = typename VectorOf<T, Bytes>::type;

/// Bytes of the widest register that this is compiled for.
#if defined(__AVX512F__)
constexpr int kRegister = 64;
#elif defined(__AVX__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif
#endif

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

// A loop over the lanes would do, but compilers unroll it before they vectorise it, and <immintrin.h> takes as long to
// compile as a user's whole dynamics.
#if defined(__has_builtin)
#if __has_builtin(__builtin_elementwise_fma) && __has_builtin(__builtin_elementwise_sqrt)
#define PYODE_ELEMENTWISE
#endif
#endif
#if defined(__has_builtin) && !defined(__CUDACC__)
#if __has_builtin(__builtin_shufflevector)
#define PYODE_SHUFFLE
#endif
#endif
constexpr int kCurrentRounding = 4;  // _MM_FROUND_CUR_DIRECTION

/// a * b + c, rounded once.
template <class R, class = std::enable_if_t<is_vector<R>>>
PYODE_HD R fused_multiply_add(R a, R b, R c) {
#if defined(PYODE_ELEMENTWISE)
  return __builtin_elementwise_fma(a, b, c);
#else
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 64) {
    if constexpr (is_single<R>)
      return __builtin_ia32_vfmaddps512_mask(a, b, c, -1, kCurrentRounding);
    else
      return __builtin_ia32_vfmaddpd512_mask(a, b, c, -1, kCurrentRounding);
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

#if defined(PYODE_VECTORS)
/// Whether it holds in any lane.
template <class M, class = std::enable_if_t<is_vector<M>>>
PYODE_HD bool any(M mask) {
#if defined(__AVX512F__) && !defined(__clang__)
  if constexpr (sizeof(M) == 64) {
    const auto all = (Vector<long long, 64>)mask;
    return __builtin_ia32_ptestmq512(all, all, -1) != 0;
  }
#endif
  if constexpr (sizeof(M) > 16) {
    Vector<int64_t, sizeof(M) / 2> half[2];
    memcpy(half, &mask, sizeof mask);
    return any(half[0] | half[1]);
  } else {
    int64_t half[2] = {};
    memcpy(half, &mask, sizeof mask);
    return (half[0] | half[1]) != 0;
  }
}
#endif

#if defined(PYODE_SHUFFLE)
template <int n, int c, int j, class R, int... l>
PYODE_HD R take_from_column(R column, R numbers, std::integer_sequence<int, l...>) {
  constexpr int L = sizeof...(l);
  return __builtin_shufflevector(column, numbers, ((l * n + c) / L == j ? L + (l * n + c) % L : l)...);
}
template <int n, int c, int j = 0, class R>
PYODE_HD R read_column(const R* numbers, R column) {
  if constexpr (j == n)
    return column;
  else
    return read_column<n, c, j + 1>(
        numbers, take_from_column<n, c, j>(column, numbers[j], std::make_integer_sequence<int, lanes<R>>{}));
}
/// As many rows of n numbers as R has lanes: columns[c] gets the c-th of each.
template <int n, int c = 0, class R>
PYODE_HD void read_columns(const number_t<R>* rows, R* columns) {
  R numbers[n];
  memcpy(numbers, rows, sizeof numbers);
  columns[c] = read_column<n, c>(numbers, R{});
  if constexpr (c + 1 < n) read_columns<n, c + 1>(rows, columns);
}
#endif

namespace math {

/// x in every lane.
template <class R>
PYODE_HD R broadcast(number_t<R> x) {
  if constexpr (is_vector<R>)
    return x - R{};  // x - 0 is x, also for -0: no instruction is spent on it
  else
    return x;
}

/// The i-th lane, to read and to write.
template <class R>
PYODE_HD auto lane(const R& x, int i) {
  if constexpr (std::is_arithmetic<R>::value)
    return x;
  else
    return x[i];
}
template <class R, class T>
PYODE_HD void set_lane(R& x, int i, T value) {
  if constexpr (std::is_arithmetic<R>::value)
    x = value;
  else
    x[i] = value;
}

template <class To, class From>
PYODE_HD To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

/// Integers to the nearest numbers, float to double and back.
template <class To, class From>
PYODE_HD To convert(From x) {
#if defined(__AVX512F__) && !defined(__clang__)
  // GCC makes two of it.
  if constexpr (sizeof(To) == 64 && std::is_same<From, Vector<float, 32>>::value)
    return __builtin_ia32_cvtps2pd512_mask(x, To{}, -1, kCurrentRounding);
  if constexpr (sizeof(From) == 64 && std::is_same<To, Vector<float, 32>>::value)
    return __builtin_ia32_cvtpd2ps512_mask(x, To{}, -1, kCurrentRounding);
#endif
  if constexpr (is_vector<From>)
    return __builtin_convertvector(x, To);
  else
    return static_cast<To>(x);
}

/// mask ? a : b.
template <class R>
PYODE_HD R select(mask_t<R> mask, R a, R b) {
  return mask ? a : b;
}

/// The larger one; nan if either is.
template <class R>
PYODE_HD R maximum(R a, R b) {
  return select((a > b) | (a != a), a, b);
}
/// The smaller one; nan if either is.
template <class R>
PYODE_HD R minimum(R a, R b) {
  return select((a < b) | (a != a), a, b);
}

/// The bit that says that a number is negative.
template <class R>
constexpr number_t<integer_t<R>> kSign = std::numeric_limits<number_t<integer_t<R>>>::min();

template <class R>
PYODE_HD R abs(R x) {
  return bit_cast<R>(bit_cast<integer_t<R>>(x) & ~kSign<R>);
}
/// The magnitude of x with the sign of y.
template <class R>
PYODE_HD R copysign(R x, R y) {
  return bit_cast<R>((bit_cast<integer_t<R>>(x) & ~kSign<R>) | (bit_cast<integer_t<R>>(y) & kSign<R>));
}
/// -x where y has its sign bit set.
template <class R>
PYODE_HD R flip_sign(R x, integer_t<R> y) {
  return bit_cast<R>(bit_cast<integer_t<R>>(x) ^ (y & kSign<R>));
}

/// To the nearest integer, ties to even.
template <class R>
PYODE_HD R round(R x) {
  constexpr number_t<R> whole = is_single<R> ? number_t<R>(0x1p23) : number_t<R>(0x1p52);  // from here on no fraction
  const R size = abs(x);
  return select(size < whole, copysign(size + whole - whole, x), x);
}
template <class R>
PYODE_HD R floor(R x) {
  const R nearest = round(x);
  return select(nearest > x, nearest - 1, nearest);
}
template <class R>
PYODE_HD R ceil(R x) {
  return -floor(-x);
}
template <class R>
PYODE_HD R trunc(R x) {
  return copysign(floor(abs(x)), x);
}

/// The square root, correctly rounded.
template <class R>
PYODE_HD R sqrt(R x) {
  if constexpr (!is_vector<R>) {
    return std::sqrt(x);
  } else {
#if defined(PYODE_ELEMENTWISE)
    return __builtin_elementwise_sqrt(x);
#else
#if defined(__AVX512F__) && !defined(__clang__)
    if constexpr (sizeof(R) == 64) {
      if constexpr (is_single<R>)
        return __builtin_ia32_sqrtps512_mask(x, x, -1, kCurrentRounding);
      else
        return __builtin_ia32_sqrtpd512_mask(x, x, -1, kCurrentRounding);
    }
#endif
#if defined(__AVX__) && !defined(__clang__)
    if constexpr (sizeof(R) == 32) {
      if constexpr (is_single<R>)
        return __builtin_ia32_sqrtps256(x);
      else
        return __builtin_ia32_sqrtpd256(x);
    }
#endif
    R result;
    for (int i = 0; i < lanes<R>; ++i) result[i] = std::sqrt(x[i]);
    return result;
#endif
  }
}

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

/// Shifted as bits are: what leaves at the top is gone.
template <class R>
PYODE_HD integer_t<R> shift_left(integer_t<R> n, int by) {
  if constexpr (is_vector<R>)
    return n << by;
  else
    return static_cast<integer_t<R>>(static_cast<std::make_unsigned_t<integer_t<R>>>(n) << by);
}

/// 2^n for -bias < n <= bias + 1 (there inf).
template <class R>
PYODE_HD R power_of_two(integer_t<R> n) {
  return bit_cast<R>(shift_left<R>(n + Format<R>::bias, Format<R>::digits));
}

}  // namespace math
}  // namespace PYODE_LEVEL
}  // namespace pyode
