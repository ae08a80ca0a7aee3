// The arithmetic of a Runge-Kutta step for one number: stage sum, scaled error, dense output.
//
// R is float, double, or any type with fused_multiply_add and the operators, such as a SIMD vector.
#pragma once

#include "common.h"

namespace pyode {
inline namespace PYODE_LEVEL {

/// sum_j w_j k_j over the first n of at most N >= 1 terms, in table order (Hairer, Norsett, Wanner I, II.1).
/// `k(j)` reads the j-th derivative.
template <int N, class R, class Read>
PYODE_HD R weighted_sum(int n, const R* w, Read k) {
  R sum = w[0] * k(0);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int j = 1; j < N; ++j)
    if (j < n) sum = fused_multiply_add(w[j], k(j), sum);
  return sum;
}

/// y + dt * sum: a stage's input, the step's end, a point of dense output.
template <class R>
PYODE_HD R advance_state(R y, R dt, R sum) {
  return fused_multiply_add(dt, sum, y);
}

/// The error relative to what is tolerated: error / (atol + rtol max(|y0|, |y1|)), in the state's arithmetic type.
/// No error is within any tolerance, zero included (Hairer, Norsett, Wanner I, II.4, eq. 4.10). An infinite state has
/// no error that could be tolerated: the result is nan.
template <class R>
PYODE_HD R scaled_error(R error, R y0, R y1, R rtol, R atol) {
  const R size = larger(y0, y1), tolerated = atol + rtol * size;
  return (error == 0 ? R{} : error / tolerated) + (size - size);
}

/// The interpolant's weight of one stage at x in [0, 1]: sum_p c[p] x^(p + 1), by Horner's rule.
PYODE_HD double interpolant_weight(const double* c, int degree, double x) {
  double weight = 0;
  for (int p = degree - 1; p >= 0; --p) weight = fused_multiply_add(weight, x, c[p]);
  return weight * x;
}

/// Its slope there: sum_p (p + 1) c[p] x^p.
PYODE_HD double interpolant_slope(const double* c, int degree, double x) {
  double slope = 0;
  for (int p = degree - 1; p >= 0; --p) slope = fused_multiply_add(slope, x, (p + 1) * c[p]);
  return slope;
}

}  // namespace PYODE_LEVEL
}  // namespace pyode
