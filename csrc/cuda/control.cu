#include "control.cuh"

namespace pyode::cuda {
namespace {

template <class T>
__global__ void control_kernel(const __grid_constant__ Control op) {
  for (int64_t b = thread_index(); b < op.state.samples; b += thread_count()) add_flags(op, control_sample<T>(op, b));
  if (op.condition == 0) {
    if (thread_index() == 0) flags_at(op)[1 - op.turn] = 0;
    return;
  }
  __syncthreads();
  if (threadIdx.x == 0 && is_last_block(op)) conclude(op);
}

// Judges the only sample's step.
template <class T>
__global__ void judge_kernel(const __grid_constant__ Control op) {
  __shared__ SharedSample sample;
  __shared__ double here[kThreads];
  sample.fetch(op, 0);
  const double* const means = gather_means(op, op.means, here);
  __syncthreads();
  const int64_t flags = judge_by_block<T>(op, 0, sample, [&](int64_t i) { return means[i]; });
  if (threadIdx.x != 0) return;
  if (op.condition != 0) return conclude(op, static_cast<unsigned long long>(flags));
  op.flags[op.turn] = flags;
  op.flags[1 - op.turn] = 0;
}

__global__ void repeat_kernel(const int64_t* left, unsigned long long condition) {
#if PYODE_GRAPH_LOOPS
  cudaGraphSetConditional(condition, *left > 0);
#endif
}

template <class T>
__global__ void select_kernel(const __grid_constant__ SelectRows op, int64_t samples, int64_t size) {
  for (int64_t i = thread_index(); i < samples * size; i += thread_count())
    static_cast<T*>(op.out)[i] = static_cast<const T*>(op.accepted[i / size] ? op.moved : op.stayed)[i];
}

}  // namespace

const char* control(const Layout& layout, const Control& op) {
  with_scalar(op.time_scalar, [&](auto kind) {
    using T = decltype(kind);
    if (op.phase == Phase::judge && op.state.samples == 1)
      judge_kernel<T><<<1, kThreads, 0, stream_of(layout)>>>(op);
    else
      control_kernel<T><<<blocks_for(op.state.samples), kThreads, 0, stream_of(layout)>>>(op);
  });
  return launch_error();
}

const char* repeat_while(const Layout& layout, const int64_t* left, unsigned long long condition) {
  repeat_kernel<<<1, 1, 0, stream_of(layout)>>>(left, condition);
  return launch_error();
}

const char* select_rows(const Layout& layout, const SelectRows& op) {
  if (layout.samples * layout.size == 0) return nullptr;
  with_scalar(layout.scalar, [&](auto kind) {
    select_kernel<decltype(kind)>
        <<<blocks_for(layout.samples * layout.size), kThreads, 0, stream_of(layout)>>>(op, layout.samples, layout.size);
  });
  return launch_error();
}

}  // namespace pyode::cuda
