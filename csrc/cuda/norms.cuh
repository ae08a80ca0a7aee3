// The mean squares of scaled errors, as several kernels sum them.
#pragma once

#include "launch.cuh"

namespace pyode::cuda {

constexpr int64_t kThreadRow = 16;  // a sample of at most so many numbers is one thread's
constexpr int64_t kWarpRow = 1024;  // and of at most so many a warp's
constexpr int64_t kMaxParts = 256;  // blocks that share the sum of a long segment

template <class T>
__device__ arithmetic_t<T> error_at(const ErrorNorm& op, double dt, int64_t i) {
  using A = arithmetic_t<T>;
  if (op.terms == 0) return 0;
  T k[kMaxStages];
#pragma unroll
  for (int j = 0; j < kMaxStages; ++j)
    if (j < op.terms) k[j] = static_cast<const T*>(op.k[j])[i];
  A w[kMaxStages];
#pragma unroll
  for (int j = 0; j < kMaxStages; ++j) w[j] = static_cast<A>(op.w[j]);
  const A sum = weighted_sum<kMaxStages>(op.terms, w, [&](int j) { return load(k[j]); });
  return static_cast<A>(dt) * sum;
}

/// The squared scaled error of number d of sample b; for complex states of the pair that begins there.
template <class T, bool kComplex>
__device__ double squared_ratio(const ErrorNorm& op, double dt, int64_t row, int64_t d) {
  const T* y0 = static_cast<const T*>(op.y0) + row + d;
  const T* y1 = static_cast<const T*>(op.y1) + row + d;
  using A = arithmetic_t<T>;
  const A rtol = static_cast<A>(op.rtol_each ? op.rtol_each[d * op.rtol_stride] : op.rtol);
  const A atol = static_cast<A>(op.atol_each ? op.atol_each[d * op.atol_stride] : op.atol);
  double r;
  if constexpr (kComplex) {
    const auto modulus = [](A re, A im) { return sqrt(re * re + im * im); };
    r = scaled_error(modulus(error_at<T>(op, dt, row + d), error_at<T>(op, dt, row + d + 1)),
                     modulus(load(y0[0]), load(y0[1])), modulus(load(y1[0]), load(y1[1])), rtol, atol);
  } else {
    r = scaled_error(fabs(error_at<T>(op, dt, row + d)), fabs(load(*y0)), fabs(load(*y1)), rtol, atol);
  }
  return r * r;
}

/// One over how many numbers, or pairs, segment s has.
template <bool kComplex>
__device__ double inverse_count(const Layout& layout, int64_t s) {
  const int64_t n = layout.segments[s + 1] - layout.segments[s];
  return n == 0 ? 0.0 : 1.0 / static_cast<double>(kComplex ? n / 2 : n);
}

/// The mean over segment s of sample b, in one thread; it is also left in op.means.
template <class T, bool kComplex>
__device__ void thread_mean(const Layout& layout, const ErrorNorm& op, int64_t s, int64_t b) {
  double sum = 0;
  for (int64_t d = layout.segments[s]; d < layout.segments[s + 1]; d += kComplex ? 2 : 1)
    sum += squared_ratio<T, kComplex>(op, op.dt[b], b * layout.size, d);
  op.means[s * op.parts * layout.samples + b] = sum * inverse_count<kComplex>(layout, s);
}

/// Part p of the mean over segment s of sample b, by a block: its threads' sums are added as a tree, always the same
/// one. The first thread leaves it in op.means.
template <class T, bool kComplex>
__device__ void block_mean(const Layout& layout, const ErrorNorm& op, int64_t s, int64_t b, int64_t p) {
  __shared__ double sums[kThreads];
  const int64_t step = kComplex ? 2 : 1, parts = op.parts;
  double sum = 0;
  for (int64_t d = layout.segments[s] + (p * blockDim.x + threadIdx.x) * step; d < layout.segments[s + 1];
       d += parts * blockDim.x * step)
    sum += squared_ratio<T, kComplex>(op, op.dt[b], b * layout.size, d);
  sums[threadIdx.x] = sum;
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) op.means[(s * parts + p) * layout.samples + b] = sums[0] * inverse_count<kComplex>(layout, s);
  __syncthreads();
}

inline bool by_threads(const Layout& layout) { return layout.samples > 1 && layout.size <= kThreadRow; }

/// How many threads take a sample's segment, where more than one do.
inline int threads_of_block(const Layout& layout) {
  return layout.samples > 1 && layout.longest_segment <= kWarpRow ? 32 : kThreads;
}

/// Calls a generic function object with a number of the state's scalar type, and with whether the state is complex.
template <class Call>
void with_numbers(const Layout& layout, Call call) {
  with_scalar(layout.scalar, [&](auto kind) {
    if (layout.is_complex) {
      call(kind, std::true_type());
    } else {
      call(kind, std::false_type());
    }
  });
}

}  // namespace pyode::cuda
