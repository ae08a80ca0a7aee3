#include "norms.cuh"

namespace pyode::cuda {
namespace {

template <class T, bool kComplex>
__global__ void thread_rows(const __grid_constant__ Layout layout, const __grid_constant__ ErrorNorm op) {
  for (int64_t b = thread_index(); b < layout.samples; b += thread_count())
    thread_mean<T, kComplex>(layout, op, blockIdx.y, b);
}

template <class T, bool kComplex>
__global__ void __launch_bounds__(kThreads, 2)
    block_rows(const __grid_constant__ Layout layout, const __grid_constant__ ErrorNorm op) {
  for (int64_t task = blockIdx.x; task < layout.samples * op.parts; task += gridDim.x) {
    block_mean<T, kComplex>(layout, op, blockIdx.y, task / op.parts, task % op.parts);
    __syncthreads();
  }
}

}  // namespace

int64_t error_parts(const Layout& layout) {
  if (layout.samples > 1 && layout.longest_segment <= kWarpRow) return 1;
  const int64_t wanted = (layout.longest_segment + 4 * kThreads - 1) / (4 * kThreads);
  const int64_t fair = layout.samples < kMaxParts ? kMaxParts / layout.samples : 1;
  return wanted < 1 ? 1 : (wanted < fair ? wanted : fair);
}

const char* error_norm(const Layout& layout, const ErrorNorm& op) {
  if (layout.samples == 0 || layout.n_segments == 0) return nullptr;
  const unsigned segments = static_cast<unsigned>(layout.n_segments);
  with_numbers(layout, [&](auto kind, auto is_complex) {
    using T = decltype(kind);
    constexpr bool kComplex = decltype(is_complex)::value;
    if (by_threads(layout)) {
      thread_rows<T, kComplex>
          <<<dim3(blocks_for(layout.samples), segments), kThreads, 0, stream_of(layout)>>>(layout, op);
    } else {
      block_rows<T, kComplex><<<dim3(blocks_for(layout.samples * op.parts, 1), segments), threads_of_block(layout), 0,
                                stream_of(layout)>>>(layout, op);
    }
  });
  return launch_error();
}

}  // namespace pyode::cuda
