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
  if (atomicAdd(flags_at(op) + 2, 1ull) + 1 < gridDim.x) return false;
  flags_at(op)[2] = 0;
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

}  // namespace pyode::cuda
