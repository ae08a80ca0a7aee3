// The mean squares of scaled errors, as several kernels sum them.
#pragma once

#include "launch.cuh"

namespace pyode::cuda {

constexpr int64_t kThreadRow = 16;  // a sample of at most so many numbers is one thread's
constexpr int64_t kWarpRow = 1024;  // and of at most so many a warp's
constexpr int64_t kMaxParts = 256;  // blocks that share the sum of a long segment

/// What the error of one real number is computed from.
template <class T>
struct ErrorTerms {
  T y0, y1, k[kMaxStages];
};

template <class T>
__device__ ErrorTerms<T> load_terms(const ErrorNorm& op, int64_t i) {
  ErrorTerms<T> terms;
  terms.y0 = static_cast<const T*>(op.y0)[i];
  terms.y1 = static_cast<const T*>(op.y1)[i];
#pragma unroll
  for (int j = 0; j < kMaxStages; ++j)
    if (j < op.terms) terms.k[j] = static_cast<const T*>(op.k[j])[i];
  return terms;
}

template <class T>
__device__ arithmetic_t<T> error_of(const ErrorNorm& op, double dt, const ErrorTerms<T>& terms) {
  using A = arithmetic_t<T>;
  if (op.terms == 0) return 0;
  A w[kMaxStages];
#pragma unroll
  for (int j = 0; j < kMaxStages; ++j) w[j] = static_cast<A>(op.w[j]);
  const A sum = weighted_sum<kMaxStages>(op.terms, w, [&](int j) { return load(terms.k[j]); });
  return static_cast<A>(dt) * sum;
}

/// The sum of the squared scaled errors of N numbers of sample b; of complex states N pairs. The first is number d, the
/// others follow `apart` from each other. All are loaded before the first is computed.
template <class T, bool kComplex, int N>
__device__ double add_squares(double sum, const ErrorNorm& op, double dt, int64_t row, int64_t d, int64_t apart) {
  using A = arithmetic_t<T>;
  constexpr int kWidth = kComplex ? 2 : 1;
  ErrorTerms<T> terms[N][kWidth];
  A rtol[N], atol[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int64_t at = d + n * apart;
#pragma unroll
    for (int part = 0; part < kWidth; ++part) terms[n][part] = load_terms<T>(op, row + at + part);
    rtol[n] = static_cast<A>(op.rtol_each ? op.rtol_each[at * op.rtol_stride] : op.rtol);
    atol[n] = static_cast<A>(op.atol_each ? op.atol_each[at * op.atol_stride] : op.atol);
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const ErrorTerms<T>& re = terms[n][0];
    double r;
    if constexpr (kComplex) {
      const ErrorTerms<T>& im = terms[n][1];
      const auto modulus = [](A x, A y) { return sqrt(x * x + y * y); };
      r = scaled_error(modulus(error_of(op, dt, re), error_of(op, dt, im)), modulus(load(re.y0), load(im.y0)),
                       modulus(load(re.y1), load(im.y1)), rtol[n], atol[n]);
    } else {
      r = scaled_error(fabs(error_of(op, dt, re)), fabs(load(re.y0)), fabs(load(re.y1)), rtol[n], atol[n]);
    }
    sum += r * r;
  }
  return sum;
}

/// Where segment s lies in a sample.
struct Segment {
  int64_t begin, end;
  __device__ Segment(const Layout& layout, int64_t s)
      : begin(layout.n_segments == 1 ? 0 : layout.segments[s]),
        end(layout.n_segments == 1 ? layout.size : layout.segments[s + 1]) {}

  /// One over how many numbers, or pairs, it has.
  template <bool kComplex>
  __device__ double inverse_count() const {
    const int64_t n = end - begin;
    return n == 0 ? 0.0 : 1.0 / static_cast<double>(kComplex ? n / 2 : n);
  }
};

/// The mean over segment s of sample b, in one thread; it is also left in op.means.
template <class T, bool kComplex>
__device__ void thread_mean(const Layout& layout, const ErrorNorm& op, int64_t s, int64_t b) {
  const Segment segment(layout, s);
  double sum = 0;
  for (int64_t d = segment.begin; d < segment.end; d += kComplex ? 2 : 1)
    sum = add_squares<T, kComplex, 1>(sum, op, op.dt[b], b * layout.size, d, 0);
  op.means[s * op.parts * layout.samples + b] = sum * segment.inverse_count<kComplex>();
}

/// The sum over a block's threads, kThreads or a warp, as a tree that is always the same: of pairs half of them apart,
/// a quarter, and so on. The first thread gets it; a __syncthreads has to come before the next.
__device__ inline double block_sum(double sum) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ double sums[kThreads];
  if (blockDim.x > kWarp) {
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= kWarp) return sum;
    double of[kWarps];
#pragma unroll
    for (int i = 0; i < kWarps; ++i) of[i] = sums[threadIdx.x + i * kWarp];
#pragma unroll
    for (int half = kWarps / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) of[i] += of[i + half];
    sum = of[0];
  }
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_down_sync(0xffffffffu, sum, half);
  return sum;
}

/// Part p of the mean over segment s of sample b, by a block. The first thread gets it, and leaves it in op.means.
template <class T, bool kComplex>
__device__ double block_mean(const Layout& layout, const ErrorNorm& op, int64_t s, int64_t b, int64_t p) {
  constexpr int kAtOnce = sizeof(arithmetic_t<T>) == 4 && !kComplex ? 2 : 1;  // more would not fit into registers
  const Segment segment(layout, s);
  const int64_t width = kComplex ? 2 : 1, row = b * layout.size;
  const int64_t first = segment.begin + (p * blockDim.x + threadIdx.x) * width, step = op.parts * blockDim.x * width;
  const double dt = op.dt[b], share = segment.inverse_count<kComplex>();
  double sum = 0;
  int64_t d = first;
  for (; d + (kAtOnce - 1) * step < segment.end; d += kAtOnce * step)
    sum = add_squares<T, kComplex, kAtOnce>(sum, op, dt, row, d, step);
  if constexpr (kAtOnce > 1)
    for (; d < segment.end; d += step) sum = add_squares<T, kComplex, 1>(sum, op, dt, row, d, step);
  const double mean = block_sum(sum) * share;
  if (threadIdx.x == 0) op.means[(s * op.parts + p) * layout.samples + b] = mean;
  return mean;
}

inline bool by_threads(const Layout& layout) { return layout.samples > 1 && layout.size <= kThreadRow; }

/// How many threads take a sample's segment, where more than one do.
inline int threads_of_block(const Layout& layout) {
  return layout.samples > 1 && layout.longest_segment <= kWarpRow ? kWarp : kThreads;
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
