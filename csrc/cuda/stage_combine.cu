#include "launch.cuh"

namespace pyode::cuda {
namespace {

// A thread loads all terms of its V numbers, and the step's size, before it adds the first: that many loads are in
// flight at once.
template <class T, int V>
__global__ void stage_combine_kernel(const __grid_constant__ StageCombine op, int64_t samples,
                                     int64_t packs_per_sample) {
  using A = arithmetic_t<T>;
  using P = Pack<T, V>;
  for (int64_t i = thread_index(); i < samples * packs_per_sample; i += thread_count()) {
    P out = static_cast<const P*>(op.y)[i];
    P k[kMaxStages];
#pragma unroll
    for (int j = 0; j < kMaxStages; ++j)
      if (j < op.terms) k[j] = static_cast<const P*>(op.k[j])[i];
    const A dt = op.terms == 0 ? A(0) : static_cast<A>(op.dt[samples == 1 ? 0 : i / packs_per_sample]);
    if (dt != 0 && op.terms > 0) {
      A w[kMaxStages];
#pragma unroll
      for (int j = 0; j < kMaxStages; ++j) w[j] = static_cast<A>(op.w[j]);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A sum = weighted_sum<kMaxStages>(op.terms, w, [&](int j) { return load(k[j].of[v]); });
        out.of[v] = store<T>(advance_state(load(out.of[v]), dt, sum));
      }
    }
    static_cast<P*>(op.out)[i] = out;
  }
}

template <class T>
__global__ void stage_vjp_kernel(const __grid_constant__ StageVjp op, int64_t samples, int64_t size) {
  using A = arithmetic_t<T>;
  for (int64_t i = thread_index(); i < samples * size; i += thread_count()) {
    const A dt = static_cast<A>(op.dt[samples == 1 ? 0 : i / size]);
    const A g = load(static_cast<const T*>(op.g)[i]);
    for (int j = 0; j < op.terms; ++j) static_cast<T*>(op.out[j])[i] = store<T>(dt * static_cast<A>(op.w[j]) * g);
  }
}

bool aligned(const void* pointer, size_t to) { return reinterpret_cast<uintptr_t>(pointer) % to == 0; }

}  // namespace

const char* stage_combine(const Layout& layout, const StageCombine& op) {
  if (layout.samples * layout.size == 0) return nullptr;
  with_scalar(layout.scalar, [&](auto kind) {
    using T = decltype(kind);
    constexpr int V = 16 / sizeof(T);
    bool wide = layout.size % V == 0 && aligned(op.y, 16) && aligned(op.out, 16);
    for (int j = 0; j < op.terms; ++j) wide = wide && aligned(op.k[j], 16);
    if (wide) {
      const int64_t packs = layout.size / V;
      stage_combine_kernel<T, V>
          <<<blocks_for(layout.samples * packs), kThreads, 0, stream_of(layout)>>>(op, layout.samples, packs);
    } else {
      stage_combine_kernel<T, 1><<<blocks_for(layout.samples * layout.size), kThreads, 0, stream_of(layout)>>>(
          op, layout.samples, layout.size);
    }
  });
  return launch_error();
}

const char* stage_vjp(const Layout& layout, const StageVjp& op) {
  if (layout.samples * layout.size == 0) return nullptr;
  with_scalar(layout.scalar, [&](auto kind) {
    stage_vjp_kernel<decltype(kind)>
        <<<blocks_for(layout.samples * layout.size), kThreads, 0, stream_of(layout)>>>(op, layout.samples, layout.size);
  });
  return launch_error();
}

}  // namespace pyode::cuda
