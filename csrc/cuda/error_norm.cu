#include "launch.cuh"

namespace pyode::cuda {
namespace {

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

template <class T, bool kComplex>
__global__ void thread_rows(const __grid_constant__ Layout layout, const __grid_constant__ ErrorNorm op) {
  const int64_t s = blockIdx.y;
  for (int64_t b = thread_index(); b < layout.samples; b += thread_count()) {
    double sum = 0;
    for (int64_t d = layout.segments[s]; d < layout.segments[s + 1]; d += kComplex ? 2 : 1)
      sum += squared_ratio<T, kComplex>(op, op.dt[b], b * layout.size, d);
    op.means[s * op.parts * layout.samples + b] = sum * inverse_count<kComplex>(layout, s);
  }
}

// A block takes one part of one segment of one sample; its threads' sums are added as a tree, always the same one.
template <class T, bool kComplex>
__global__ void block_rows(const __grid_constant__ Layout layout, const __grid_constant__ ErrorNorm op) {
  __shared__ double sums[kThreads];
  const int64_t s = blockIdx.y, step = kComplex ? 2 : 1, parts = op.parts;
  for (int64_t task = blockIdx.x; task < layout.samples * parts; task += gridDim.x) {
    const int64_t b = task / parts, p = task % parts;
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
}

template <class T, bool kComplex>
void launch(const Layout& layout, const ErrorNorm& op) {
  const unsigned segments = static_cast<unsigned>(layout.n_segments);
  if (layout.samples > 1 && layout.size <= kThreadRow) {
    thread_rows<T, kComplex>
        <<<dim3(blocks_for(layout.samples), segments), kThreads, 0, stream_of(layout)>>>(layout, op);
    return;
  }
  const int threads = layout.samples > 1 && layout.longest_segment <= kWarpRow ? 32 : kThreads;
  block_rows<T, kComplex>
      <<<dim3(blocks_for(layout.samples * op.parts, 1), segments), threads, 0, stream_of(layout)>>>(layout, op);
}

}  // namespace

int64_t error_parts(const Layout& layout) {
  if (layout.samples > 1 && layout.longest_segment <= kWarpRow) return 1;
  const int64_t wanted = (layout.longest_segment + 4 * kThreads - 1) / (4 * kThreads);
  const int64_t fair = layout.samples < kMaxParts ? kMaxParts / layout.samples : 1;
  return wanted < 1 ? 1 : (wanted < fair ? wanted : fair);
}

const char* error_norm(const Layout& layout, const ErrorNorm& op) {
  if (layout.samples == 0 || layout.n_segments == 0) return nullptr;
  with_scalar(layout.scalar, [&](auto kind) {
    using T = decltype(kind);
    if (layout.is_complex) {
      launch<T, true>(layout, op);
    } else {
      launch<T, false>(layout, op);
    }
  });
  return launch_error();
}

}  // namespace pyode::cuda
