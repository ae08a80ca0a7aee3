// What the kernels share: launch sizes, the check behind a launch, vector loads.
#pragma once

#include <cuda_runtime.h>

#include "../core/step.h"
#include "../ops.h"

// Whether this CUDA has graphs with a WHILE node: 12.4 and later.
#if CUDART_VERSION >= 12040
#define PYODE_GRAPH_LOOPS 1
#else
#define PYODE_GRAPH_LOOPS 0
#endif

namespace pyode::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kMaxBlocks = 1 << 16;  // beyond, a thread takes several turns

inline unsigned blocks_for(int64_t work, int64_t per_block = kThreads) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < 1 ? 1 : (blocks < kMaxBlocks ? blocks : kMaxBlocks));
}

inline cudaStream_t stream_of(const Layout& layout) { return static_cast<cudaStream_t>(layout.stream); }

inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

__device__ inline int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t thread_count() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

/// V numbers that are loaded and stored together.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T of[V];
};

}  // namespace pyode::cuda
