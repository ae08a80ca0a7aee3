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

const char* finish_step(const Layout& layout, const FinishStep& op) {
  return by_cuts(layout, [&](unsigned blocks, int threads, int64_t cuts) {
    with_scalar(layout.scalar, [&](auto kind) {
      finish_kernel<decltype(kind)><<<blocks, threads, 0, stream_of(layout)>>>(op, layout.samples, layout.size, cuts);
    });
  });
}

}  // namespace pyode::cuda
