#include "control.cuh"
#include "norms.cuh"
#include "outputs.cuh"

namespace pyode::cuda {
namespace {

// A thread takes a sample of few numbers in one segment: its error, and what comes of it.
template <class T, bool kComplex>
__global__ void judge_threads(const __grid_constant__ Layout layout, const __grid_constant__ ErrorNorm norm,
                              const __grid_constant__ Control op) {
  for (int64_t b = thread_index(); b < layout.samples; b += thread_count()) {
    thread_mean<T, kComplex>(layout, norm, 0, b);
    const double error = norm_of<double>(op, norm.means, b);
    Sample s;
    add_flags(op, control_step(op, b, error, fitting_factor(op.policy, error), s));
    for (int i = 0; i < op.n_times; ++i) write_stage_time<T>(op, i, s, b);
  }
  __syncthreads();
  if (threadIdx.x == 0 && is_last_block(op)) conclude(op);
}

// A block takes a sample of one segment, to the end.
template <class T, bool kComplex>
__global__ void end_blocks(const __grid_constant__ Layout layout, const __grid_constant__ ErrorNorm norm,
                           const __grid_constant__ Control op, const __grid_constant__ FinishStep finish) {
  __shared__ SharedSample sample;
  for (int64_t b = blockIdx.x; b < layout.samples; b += gridDim.x) {
    sample.fetch(op, b);
    const double mean = block_mean<T, kComplex>(layout, norm, 0, b, 0);
    __syncthreads();
    const int64_t flags = judge_by_block<T>(op, b, sample, [&](int64_t) { return mean; });
    if (threadIdx.x == 0) add_flags(op, flags);
    finish_cut<T>(finish, sample.get(), b, layout.size, 0, 1);
    __syncthreads();
  }
  if (threadIdx.x == 0 && is_last_block(op)) conclude(op);
}

// Two at a time fit into a multiprocessor. Blocks take the parts of the only sample's segments, and the one that is
// done last what comes of the error; if there is one only, to the end.
template <class T, bool kComplex>
__global__ void __launch_bounds__(kThreads, 2)
    end_parts(const __grid_constant__ Layout layout, const __grid_constant__ ErrorNorm norm,
              const __grid_constant__ Control op, const __grid_constant__ FinishStep finish) {
  __shared__ SharedSample sample;
  __shared__ double here[kThreads];
  const double* means = here;
  sample.fetch(op, 0);
  for (int64_t task = blockIdx.x; task < layout.n_segments * norm.parts; task += gridDim.x) {
    const double mean = block_mean<T, kComplex>(layout, norm, task / norm.parts, 0, task % norm.parts);
    if (threadIdx.x == 0) here[0] = mean;
    __syncthreads();
  }
  if (gridDim.x > 1) {
    __shared__ bool last;
    if (threadIdx.x == 0) last = is_last_block(op);
    __syncthreads();
    if (!last) return;
    means = gather_means(op, norm.means, here);
    __syncthreads();
  }
  const int64_t flags = judge_by_block<T>(op, 0, sample, [&](int64_t i) { return means[i]; });
  if (threadIdx.x == 0) conclude(op, static_cast<unsigned long long>(flags));
  if (gridDim.x == 1) finish_cut<T>(finish, sample.get(), 0, layout.size, 0, 1);
}

}  // namespace

const char* end_step(const Layout& layout, const ErrorNorm& norm, const Control& op, const FinishStep& finish) {
  const bool alone = layout.samples == 1;
  const bool by_samples = !alone && layout.n_segments == 1 && norm.parts == 1;
  if (layout.n_segments != op.n_segments || layout.n_segments == 0 || !(alone || by_samples)) {
    const char* error = error_norm(layout, norm);
    if (error == nullptr) error = control(layout, op);
    return error != nullptr ? error : finish_step(layout, finish);
  }
  const cudaStream_t stream = stream_of(layout);
  const unsigned blocks = blocks_for(alone ? layout.n_segments * norm.parts : layout.samples, 1);
  with_numbers(layout, [&](auto kind, auto is_complex) {
    using T = decltype(kind);
    constexpr bool kComplex = decltype(is_complex)::value;
    if (alone) {
      end_parts<T, kComplex><<<blocks, kThreads, 0, stream>>>(layout, norm, op, finish);
    } else if (by_threads(layout)) {
      judge_threads<T, kComplex><<<blocks_for(layout.samples), kThreads, 0, stream>>>(layout, norm, op);
    } else {
      end_blocks<T, kComplex><<<blocks, threads_of_block(layout), 0, stream>>>(layout, norm, op, finish);
    }
  });
  const char* const error = launch_error();
  const bool ended = alone ? blocks == 1 : !by_threads(layout);
  return error != nullptr || ended ? error : finish_step(layout, finish);
}

}  // namespace pyode::cuda
