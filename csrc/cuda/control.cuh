// What kernels that control a step have in common.
#pragma once

#include "../control.h"
#include "launch.cuh"

namespace pyode::cuda {

__device__ inline unsigned long long* flags_at(const Control& op) {
  return reinterpret_cast<unsigned long long*>(op.flags);
}

__device__ inline void add_flags(const Control& op, int64_t flags) {
  atomicOr(flags_at(op) + op.turn, static_cast<unsigned long long>(flags));
}

/// Whether all other blocks have come here too. To be called by one thread of each, behind a __syncthreads.
__device__ inline bool is_last_block(const Control& op) {
  __threadfence();
  unsigned* const count = reinterpret_cast<unsigned*>(flags_at(op) + 2);  // back at 0 behind the last one
  if (atomicInc(count, gridDim.x - 1) + 1 < gridDim.x) return false;
  __threadfence();
  return true;
}

/// In a loop on the device: leaves the flags of all samples for the host, and says whether there is another turn.
__device__ inline void conclude(const Control& op, unsigned long long all) {
  flags_at(op)[1] = all;
#if PYODE_GRAPH_LOOPS
  if (op.condition != 0) cudaGraphSetConditional(op.condition, (all & kAnyRunning) != 0);
#endif
}
__device__ inline void conclude(const Control& op) { conclude(op, atomicExch(flags_at(op), 0ull)); }

/// Sample b's words, in a block's shared memory: copied there by as many threads, so that one wait serves all.
struct SharedSample {
  static_assert(kWords <= kWarp && kMaxStages <= kWarp, "a word, or a stage's time, for each thread of a warp");
  double words[kWords];

  __device__ void fetch(const Control& op, int64_t b) {
    if (threadIdx.x < kWords) words[threadIdx.x] = op.state.words[threadIdx.x * op.state.stride + b];
  }
  __device__ Sample get() { return load_sample({words, 1, 1}, 0); }
};

/// Judges the step just tried by sample b, which was fetched before a __syncthreads, and plans the next one: the
/// block's first thread does, which gets the flags, while others write the stages' times. `part` as for
/// largest_root_mean.
template <class T, class Part>
__device__ int64_t judge_by_block(const Control& op, int64_t b, SharedSample& sample, Part part) {
  int64_t flags = 0;
  if (threadIdx.x == 0) {
    Sample s = sample.get();
    const double error = largest_root_mean<double>(op, part);
    flags = judge_and_plan(op, b, error, fitting_factor(op.policy, error), s);
    store_sample({sample.words, 1, 1}, 0, s);
  }
  __syncthreads();
  if (threadIdx.x < kWords) op.state.words[threadIdx.x * op.state.stride + b] = sample.words[threadIdx.x];
  const int mine = static_cast<int>(threadIdx.x);
  if (mine < op.n_times) write_stage_time<T>(op, mine, sample.get(), b);
  return flags;
}

/// What error_norm has left of the only sample, for a block: in `here`, [kThreads], if there is room.
__device__ inline const double* gather_means(const Control& op, const double* means, double* here) {
  const int64_t n = op.n_segments * op.parts;
  if (n > kThreads) return means;
  if (threadIdx.x < n) here[threadIdx.x] = means[threadIdx.x];
  return here;
}

}  // namespace pyode::cuda
