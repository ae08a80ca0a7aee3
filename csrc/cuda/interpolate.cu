#include "outputs.cuh"

namespace pyode::cuda {
namespace {

template <class T>
__global__ void interpolate_kernel(const __grid_constant__ Interpolate op, int64_t samples, int64_t size,
                                   int64_t cuts) {
  for (int64_t task = blockIdx.x; task < samples * cuts; task += gridDim.x) {
    const int64_t b = task / cuts;
    interpolate_cut<T>(op, load_sample(op.state, b), b, size, task % cuts, cuts);
    __syncthreads();
  }
}

template <class T>
__global__ void finish_kernel(const __grid_constant__ FinishStep op, int64_t samples, int64_t size, int64_t cuts) {
  for (int64_t task = blockIdx.x; task < samples * cuts; task += gridDim.x) {
    const int64_t b = task / cuts;
    finish_cut<T>(op, load_sample(op.outputs.state, b), b, size, task % cuts, cuts);
    __syncthreads();
  }
}

// The interpolant's weight as torch's ops work it out, which the host has for the outputs of several samples.
__device__ double weight_of_samples(const double* c, int degree, double x) {
  double weight = 0;
  for (int p = degree - 1; p >= 0; --p) weight = (weight + c[p]) * x;
  return weight;
}

// A thread takes the same numbers of every share. Weights are worked out for as many outputs as a sum has terms.
template <class T>
__global__ void interpolate_vjp_kernel(const __grid_constant__ InterpolateVjp op, int64_t samples, int64_t size,
                                       int64_t cuts) {
  using A = arithmetic_t<T>;
  __shared__ double weights[kMaxStages][kMaxStages];  // of each stage at each output
  __shared__ bool at_end[kMaxStages];
  const Interpolate& outputs = op.outputs;
  for (int64_t task = blockIdx.x; task < samples * cuts; task += gridDim.x) {
    const int64_t b = task / cuts, begin = task % cuts * blockDim.x + threadIdx.x, step = cuts * blockDim.x;
    const Sample s = load_sample(outputs.state, b);
    const A dt = static_cast<A>(s.dt_prev);
    for (int64_t d = b * size + begin; d < (b + 1) * size; d += step) {
      for (int j = 0; j < outputs.terms; ++j) static_cast<T*>(op.out[j])[d] = store<T>(A(0));
      if (op.start != nullptr) static_cast<T*>(op.start)[d] = static_cast<T*>(op.end)[d] = store<T>(A(0));
    }
    for (int64_t first = s.output_begin; first < s.output_end; first += kMaxStages) {
      const int64_t left = s.output_end - first, n = left < kMaxStages ? left : kMaxStages;
      __syncthreads();
      for (int64_t i = threadIdx.x; i < n * (outputs.terms + 1); i += blockDim.x) {
        const int64_t m = i / (outputs.terms + 1), j = i % (outputs.terms + 1);
        const double x = output_position(s, output_time(outputs.grid, first + m, b));
        if (j == outputs.terms) {
          at_end[m] = samples == 1 && x == 1;
        } else if (samples == 1) {
          weights[j][m] = x == 1 ? 0 : interpolant_weight(outputs.c[j], outputs.degree, x);
        } else {
          weights[j][m] = x == 1 ? outputs.end[j] : weight_of_samples(outputs.c[j], outputs.degree, x);
        }
      }
      __syncthreads();
      for (int64_t d = b * size + begin; d < (b + 1) * size; d += step) {
        const T* const g = static_cast<const T*>(op.g) + first * outputs.out_stride + d;
        for (int j = 0; j < outputs.terms; ++j) {
          T* const out = static_cast<T*>(op.out[j]) + d;
          A sum = 0;
          int terms = 0;
          for (int64_t m = 0; m < n; ++m) {
            if (samples > 1) {  // one by one
              const T share = store<T>(static_cast<A>(weights[j][m] * s.dt_prev) * load(g[m * outputs.out_stride]));
              *out = store<T>(load(*out) + load(share));
              continue;
            }
            if (weights[j][m] == 0) continue;
            const A w = static_cast<A>(weights[j][m]), of = load(g[m * outputs.out_stride]);
            sum = terms++ == 0 ? w * of : fused_multiply_add(w, of, sum);
          }
          if (terms > 0 && dt != 0) *out = store<T>(advance_state(load(*out), dt, sum));
        }
        if (op.start == nullptr) continue;
        for (int64_t m = 0; m < n; ++m) {
          T* const sum = static_cast<T*>(at_end[m] ? op.end : op.start) + d;
          *sum = store<T>(load(*sum) + load(g[m * outputs.out_stride]));
        }
      }
    }
    __syncthreads();
  }
}

/// Launches a kernel over (op, samples, size, cuts).
template <class Launch>
const char* by_cuts(const Layout& layout, Launch launch) {
  if (layout.samples * layout.size == 0) return nullptr;
  const int threads = layout.size <= kWarp ? kWarp : kThreads;
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

const char* interpolate_vjp(const Layout& layout, const InterpolateVjp& op) {
  return by_cuts(layout, [&](unsigned blocks, int threads, int64_t cuts) {
    with_scalar(layout.scalar, [&](auto kind) {
      interpolate_vjp_kernel<decltype(kind)>
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
