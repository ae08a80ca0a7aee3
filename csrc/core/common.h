// What every core header needs: host-and-device functions, scalar types, fused multiply-add.
//
// core/ is the mathematics of one number or one sample. No loops over arrays, no allocation, no
// exceptions: it is compiled by g++, nvcc, and at run time around a user's dynamics.
#pragma once

#if !defined(__CUDACC_RTC__)
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#endif

#if defined(__CUDACC__)
#define PYODE_HD __host__ __device__ __forceinline__
#else
#define PYODE_HD inline
#endif

// Before a short loop whose counter is to be a constant in every turn.
#if defined(__CUDA_ARCH__)
#define PYODE_UNROLL _Pragma("unroll")
#elif defined(__GNUC__) && !defined(__CUDACC__)
#define PYODE_UNROLL _Pragma("GCC unroll 32")
#else
#define PYODE_UNROLL
#endif

// The CPU loops are compiled once for each SIMD level. Every inline function lives in a namespace named
// after its level, so the linker can't hand AVX-512 code to a machine that has none.
#ifndef PYODE_LEVEL
#define PYODE_LEVEL generic
#endif

namespace pyode {

constexpr int kMaxStages = 16;  // the longest tableau: dopri8 has 14
constexpr int kMaxDegree = 8;   // of an interpolant

/// How numbers are stored. The 16-bit types are computed with in float.
enum class Scalar : int32_t { float32, float64, bfloat16, float16 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline namespace PYODE_LEVEL {

/// The type in which stage sums and interpolation of a stored type are computed.
template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class T>
using arithmetic_t = typename Arithmetic<T>::type;

PYODE_HD uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
PYODE_HD float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

PYODE_HD float load(float x) { return x; }
PYODE_HD double load(double x) { return x; }
PYODE_HD float load(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
PYODE_HD float load(Float16 x) {
  // The exponent is rebiased by a multiplication, which also normalises subnormals.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const float rebiased = float_of(magnitude) * 5.192296858534828e+33f;  // 2^112
  const uint32_t special = (x.bits & 0x7c00u) == 0x7c00u ? (magnitude | 0x7f800000u) : bits_of(rebiased);
  return float_of(sign | special);
}

template <class T>
PYODE_HD T store(arithmetic_t<T> x);
template <>
PYODE_HD float store<float>(float x) {
  return x;
}
template <>
PYODE_HD double store<double>(double x) {
  return x;
}
template <>
PYODE_HD BFloat16 store<BFloat16>(float x) {  // to nearest, ties to even
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}
template <>
PYODE_HD Float16 store<Float16>(float x) {  // to nearest, ties to even
  const uint32_t u = bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 0.5 lets the float unit round at the right place.
  const uint32_t small = bits_of(float_of(a) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const uint32_t finite = a < 0x38800000u ? small : normal;
  const uint32_t magnitude = a > 0x7f800000u ? 0x7e00u : (a >= 0x477ff000u ? 0x7c00u : finite);
  return {static_cast<uint16_t>(sign | magnitude)};
}

PYODE_HD float fused_multiply_add(float a, float b, float c) {
#if defined(__GNUC__) && !defined(__CUDACC__)
  return __builtin_fmaf(a, b, c);
#else
  return fmaf(a, b, c);
#endif
}
PYODE_HD double fused_multiply_add(double a, double b, double c) {
#if defined(__GNUC__) && !defined(__CUDACC__)
  return __builtin_fma(a, b, c);
#else
  return fma(a, b, c);
#endif
}

/// The larger one; nan if either is.
template <class R>
PYODE_HD R larger(R a, R b) {
  return (a > b || a != a) ? a : b;
}
/// The smaller one; b if either is nan.
template <class R>
PYODE_HD R smaller(R a, R b) {
  return a < b ? a : b;
}
template <class R>
PYODE_HD auto is_finite(R x) {
  return x - x == 0;
}

// What vector.h has for vectors too.
PYODE_HD bool any(bool flag) { return flag; }
PYODE_HD double magnitude(double x) { return fabs(x); }
template <class R>
PYODE_HD R read_at(const double* from, int64_t i) {
  return from[i];
}

/// x rounded to T, then its neighbour in the direction of `sign` (none where sign is 0).
template <class T>
PYODE_HD T round_and_nudge(double x, int64_t sign);

template <class U, class T>
PYODE_HD T nudge(T value, bool negative, bool zero, int64_t sign) {
  // Stored numbers of one sign are ordered as their bit patterns are.
  U bits;
  memcpy(&bits, &value, sizeof bits);
  if (zero) {
    bits = static_cast<U>(sign > 0 ? 1 : (U(1) << (8 * sizeof(U) - 1)) | 1);
  } else {
    bits = static_cast<U>(bits + ((sign > 0) != negative ? 1 : -1));
  }
  memcpy(&value, &bits, sizeof bits);
  return value;
}

template <>
PYODE_HD double round_and_nudge<double>(double x, int64_t sign) {
  return sign == 0 ? x : nudge<uint64_t>(x, x < 0, x == 0, sign);
}
template <>
PYODE_HD float round_and_nudge<float>(double x, int64_t sign) {
  const float r = static_cast<float>(x);
  return sign == 0 ? r : nudge<uint32_t>(r, r < 0, r == 0, sign);
}
template <>
PYODE_HD BFloat16 round_and_nudge<BFloat16>(double x, int64_t sign) {
  const BFloat16 r = store<BFloat16>(static_cast<float>(x));
  return sign == 0 ? r : nudge<uint16_t>(r, load(r) < 0, load(r) == 0, sign);
}
template <>
PYODE_HD Float16 round_and_nudge<Float16>(double x, int64_t sign) {
  const Float16 r = store<Float16>(static_cast<float>(x));
  return sign == 0 ? r : nudge<uint16_t>(r, load(r) < 0, load(r) == 0, sign);
}

#if !defined(__CUDACC_RTC__)
/// Calls body with a value of the stored type.
template <class Body>
void with_scalar(Scalar scalar, Body body) {
  switch (scalar) {
    case Scalar::float32:
      return body(float{});
    case Scalar::float64:
      return body(double{});
    case Scalar::bfloat16:
      return body(BFloat16{});
    case Scalar::float16:
      return body(Float16{});
  }
}
#endif

}  // namespace PYODE_LEVEL
}  // namespace pyode
