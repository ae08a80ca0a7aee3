#include "control.cuh"
#include "norms.cuh"

namespace pyode::cuda {
namespace {

// A thread takes a sample of few numbers in one segment: its error, and what comes of it.
template <class T, bool kComplex>
__global__ void judge_threads(const __grid_constant__ Layout layout, const __grid_constant__ ErrorNorm norm,
                              const __grid_constant__ Control op) {
  for (int64_t b = thread_index(); b < layout.samples; b += thread_count()) {
    thread_mean<T, kComplex>(layout, norm, 0, b);
    add_flags(op, control_sample<T>(op, b));
  }
  __syncthreads();
  if (threadIdx.x == 0 && is_last_block(op)) conclude(op);
}

// A block takes a sample of one segment, and its first thread what comes of the error.
template <class T, bool kComplex>
__global__ void judge_blocks(const __grid_constant__ Layout layout, const __grid_constant__ ErrorNorm norm,
                             const __grid_constant__ Control op) {
  for (int64_t b = blockIdx.x; b < layout.samples; b += gridDim.x) {
    block_mean<T, kComplex>(layout, norm, 0, b, 0);
    if (threadIdx.x == 0) add_flags(op, control_sample<T>(op, b));
    __syncthreads();
  }
  if (threadIdx.x == 0 && is_last_block(op)) conclude(op);
}

// Blocks take the parts of the only sample's segments, and the one that is done last what comes of the error.
template <class T, bool kComplex>
__global__ void judge_parts(const __grid_constant__ Layout layout, const __grid_constant__ ErrorNorm norm,
                            const __grid_constant__ Control op) {
  for (int64_t task = blockIdx.x; task < layout.n_segments * norm.parts; task += gridDim.x) {
    block_mean<T, kComplex>(layout, norm, task / norm.parts, 0, task % norm.parts);
    __syncthreads();
  }
  if (threadIdx.x != 0 || (gridDim.x > 1 && !is_last_block(op))) return;
  conclude(op, static_cast<unsigned long long>(control_sample<T>(op, 0)));
}

}  // namespace

const char* measure_and_judge(const Layout& layout, const ErrorNorm& norm, const Control& op) {
  const bool by_samples = layout.samples > 1 && layout.n_segments == 1 && norm.parts == 1;
  if (layout.n_segments != op.n_segments || layout.n_segments == 0 || !(layout.samples == 1 || by_samples)) {
    const char* const error = error_norm(layout, norm);
    return error != nullptr ? error : control(layout, op);
  }
  const cudaStream_t stream = stream_of(layout);
  with_numbers(layout, [&](auto kind, auto is_complex) {
    using T = decltype(kind);
    constexpr bool kComplex = decltype(is_complex)::value;
    if (layout.samples == 1) {
      judge_parts<T, kComplex>
          <<<blocks_for(layout.n_segments * norm.parts, 1), kThreads, 0, stream>>>(layout, norm, op);
    } else if (by_threads(layout)) {
      judge_threads<T, kComplex><<<blocks_for(layout.samples), kThreads, 0, stream>>>(layout, norm, op);
    } else {
      judge_blocks<T, kComplex>
          <<<blocks_for(layout.samples, 1), threads_of_block(layout), 0, stream>>>(layout, norm, op);
    }
  });
  return launch_error();
}

}  // namespace pyode::cuda
