// What a step's end leaves, by blocks: outputs that it has passed, and the state from which the next one starts.
#pragma once

#include "launch.cuh"

namespace pyode::cuda {

/// The outputs that sample s has passed, in one block's cut of it. A thread works out the weight of each stage, once
/// for each output.
template <class T>
__device__ void interpolate_cut(const Interpolate& op, const Sample& s, int64_t b, int64_t size, int64_t cut,
                                int64_t cuts) {
  using A = arithmetic_t<T>;
  __shared__ double weights[kMaxStages];
  __shared__ A w[kMaxStages];  // those other than zero, and whose they are
  __shared__ int stage[kMaxStages], terms;
  const A dt = static_cast<A>(s.dt_prev);
  const int mine = static_cast<int>(threadIdx.x);
  for (int64_t i = s.output_begin; i < s.output_end; ++i) {
    __syncthreads();
    if (mine < op.terms) {
      const double x = output_position(s, output_time(op.grid, i, b));
      weights[mine] = x == 1 ? op.end[mine] : interpolant_weight(op.c[mine], op.degree, x);
    }
    __syncthreads();
    if (mine <= op.terms) {
      int before = 0;
      for (int j = 0; j < mine; ++j) before += weights[j] != 0;
      if (mine == op.terms) {
        terms = before;
      } else if (weights[mine] != 0) {
        w[before] = static_cast<A>(weights[mine]);
        stage[before] = mine;
      }
    }
    __syncthreads();
    T* out = static_cast<T*>(op.out) + i * op.out_stride + b * size;
    for (int64_t d = cut * blockDim.x + threadIdx.x; d < size; d += cuts * blockDim.x) {
      const int64_t at = b * size + d;
      const A y = load(static_cast<const T*>(op.y)[at]);
      if (terms == 0) {
        out[d] = store<T>(y);
        continue;
      }
      const A sum =
          weighted_sum<kMaxStages>(terms, w, [&](int j) { return load(static_cast<const T*>(op.k[stage[j]])[at]); });
      out[d] = store<T>(advance_state(y, dt, sum));
    }
  }
}

/// All that FinishStep does for sample s, in one block's cut of it: a thread moves those numbers whose outputs it has
/// written, and loads several before it stores the first.
template <class T>
__device__ void finish_cut(const FinishStep& op, const Sample& s, int64_t b, int64_t size, int64_t cut, int64_t cuts) {
  using A = arithmetic_t<T>;
  constexpr int kAtOnce = 4;
  interpolate_cut<T>(op.outputs, s, b, size, cut, cuts);
  const T* const from = static_cast<const T*>(s.accepted ? op.y1 : op.y) + b * size;
  const T* const slope = static_cast<const T*>(s.accepted ? op.k1 : op.k0) + b * size;
  T* const to = static_cast<T*>(op.y) + b * size;
  T* const k0 = static_cast<T*>(op.k0) + b * size;
  T* const stage = op.stage == nullptr ? nullptr : static_cast<T*>(op.stage) + b * size;
  const A dt = static_cast<A>(s.dt), w = static_cast<A>(op.w);
  const int64_t step = cuts * blockDim.x;
  for (int64_t first = cut * blockDim.x + threadIdx.x; first < size; first += kAtOnce * step) {
    T y[kAtOnce], k[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int64_t d = first + n * step;
      if (d < size) y[n] = from[d], k[n] = slope[d];
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int64_t d = first + n * step;
      if (d >= size) break;
      if (s.accepted) to[d] = y[n], k0[d] = k[n];
      if (stage != nullptr) stage[d] = dt == 0 ? y[n] : store<T>(advance_state(load(y[n]), dt, w * load(k[n])));
    }
  }
}

}  // namespace pyode::cuda
