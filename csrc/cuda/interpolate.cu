#include "launch.cuh"

namespace pyode::cuda {
namespace {

/// The outputs that sample s has passed, in one block's cut of it. The block's first thread works out the weights, once
/// for each output.
template <class T>
__device__ void interpolate_cut(const Interpolate& op, const Sample& s, int64_t b, int64_t size, int64_t cut,
                                int64_t cuts) {
  using A = arithmetic_t<T>;
  __shared__ A w[kMaxStages];
  __shared__ int stage[kMaxStages], terms;
  const A dt = static_cast<A>(s.dt_prev);
  for (int64_t i = s.output_begin; i < s.output_end; ++i) {
    __syncthreads();
    if (threadIdx.x == 0) {
      const double x = output_position(s, output_time(op.grid, i, b));
      terms = 0;
      for (int j = 0; j < op.terms; ++j) {
        const double weight = x == 1 ? op.end[j] : interpolant_weight(op.c[j], op.degree, x);
        if (weight == 0) continue;
        w[terms] = static_cast<A>(weight);
        stage[terms++] = j;
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

template <class T>
__global__ void interpolate_kernel(const __grid_constant__ Interpolate op, int64_t samples, int64_t size,
                                   int64_t cuts) {
  for (int64_t task = blockIdx.x; task < samples * cuts; task += gridDim.x) {
    const int64_t b = task / cuts;
    interpolate_cut<T>(op, load_sample(op.state, b), b, size, task % cuts, cuts);
    __syncthreads();
  }
}

// A thread moves those numbers of a sample whose outputs it has written.
template <class T>
__global__ void finish_kernel(const __grid_constant__ FinishStep op, int64_t samples, int64_t size, int64_t cuts) {
  using A = arithmetic_t<T>;
  for (int64_t task = blockIdx.x; task < samples * cuts; task += gridDim.x) {
    const int64_t b = task / cuts, cut = task % cuts;
    const Sample s = load_sample(op.outputs.state, b);
    interpolate_cut<T>(op.outputs, s, b, size, cut, cuts);
    __syncthreads();
    const T* const from = static_cast<const T*>(s.accepted ? op.y1 : op.y);
    const T* const slope = static_cast<const T*>(s.accepted ? op.k1 : op.k0);
    const A dt = static_cast<A>(s.dt), w = static_cast<A>(op.w);
    for (int64_t d = cut * blockDim.x + threadIdx.x; d < size; d += cuts * blockDim.x) {
      const int64_t at = b * size + d;
      const T y = from[at], k = slope[at];
      if (s.accepted) {
        static_cast<T*>(op.y)[at] = y;
        static_cast<T*>(op.k0)[at] = k;
      }
      if (op.stage != nullptr)
        static_cast<T*>(op.stage)[at] = dt == 0 ? y : store<T>(advance_state(load(y), dt, w * load(k)));
    }
  }
}

/// Launches a kernel over (op, samples, size, cuts).
template <class Launch>
const char* by_cuts(const Layout& layout, Launch launch) {
  if (layout.samples * layout.size == 0) return nullptr;
  const int threads = layout.size <= 32 ? 32 : kThreads;
  const int64_t cuts = blocks_for(layout.size, threads);
  launch(blocks_for(layout.samples * cuts, 1), threads, cuts);
  return launch_error();
}

}  // namespace

const char* interpolate(const Layout& layout, const Interpolate& op) {
  return by_cuts(layout, [&](unsigned blocks, int threads, int64_t cuts) {
    with_scalar(layout.scalar, [&](auto kind) {
      interpolate_kernel<decltype(kind)>
          <<<blocks, threads, 0, stream_of(layout)>>>(op, layout.samples, layout.size, cuts);
    });
  });
}

const char* finish_step(const Layout& layout, const FinishStep& op) {
  return by_cuts(layout, [&](unsigned blocks, int threads, int64_t cuts) {
    with_scalar(layout.scalar, [&](auto kind) {
      finish_kernel<decltype(kind)><<<blocks, threads, 0, stream_of(layout)>>>(op, layout.samples, layout.size, cuts);
    });
  });
}

}  // namespace pyode::cuda
