// Matrix products within a row: small ones by broadcast multiply-adds, wide ones in register blocks.
#pragma once

#if !defined(__GNUC__)
#error "compiled dynamics need a compiler with vector extensions: g++ or clang++"
#endif

#include "../core/vector.h"

namespace pyode {
inline namespace PYODE_LEVEL {
namespace compiled {

using namespace math;

/// A number as it is, or in every lane.
template <class R, class X>
PYODE_HD R spread(X x) {
  if constexpr (std::is_same<R, X>::value)
    return x;
  else
    return broadcast<R>(x);
}

/// Distances between neighbours along a matrix's three axes, in numbers.
struct Strides {
  int batch, row, column;
};

constexpr int kAccumulators = 8;

// out[j] = sum_k a[k] b[k, j] for n columns.
template <int n, int K, class A, class B, class R>
PYODE_HD void multiply_columns(const A* a, int step_a, const B* b, int step_k, int step_j, R* out) {
  R sums[n];
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) sums[j] = spread<R>(a[0]) * spread<R>(b[j * step_j]);
#pragma GCC unroll 1
  for (int k = 1; k < K; ++k) {
    const R factor = spread<R>(a[k * step_a]);
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) sums[j] = fused_multiply_add(spread<R>(b[k * step_k + j * step_j]), factor, sums[j]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) out[j] = sums[j];
}

/// out[n, i, j] = sum_k a[n, i, k] b[n, k, j], one behind the other; K >= 1. Terms are added in the order of k.
template <int N, int I, int J, int K, class A, class B, class R>
PYODE_HD void contract(const A* a, Strides sa, const B* b, Strides sb, R* out) {
  for (int n = 0; n < N; ++n)
    for (int i = 0; i < I; ++i) {
      const A* const row = a + n * sa.batch + i * sa.row;
      const B* const matrix = b + n * sb.batch;
      R* const to = out + (n * I + i) * J;
      constexpr int whole = J / kAccumulators * kAccumulators, rest = J - whole;
      for (int j = 0; j < whole; j += kAccumulators)
        multiply_columns<kAccumulators, K>(row, sa.column, matrix + j * sb.column, sb.row, sb.column, to + j);
      if constexpr (rest > 0)
        multiply_columns<rest, K>(row, sa.column, matrix + whole * sb.column, sb.row, sb.column, to + whole);
    }
}

}  // namespace compiled
}  // namespace PYODE_LEVEL
}  // namespace pyode
