#include "levels.h"
#include "rows.h"

namespace pyode::cpu::PYODE_LEVEL {

void stage_combine(const Layout& layout, const StageCombine& op) {
  with_scalar(layout.scalar, [&](auto kind) {
    using T = decltype(kind);
    Terms<T> terms = {static_cast<T*>(op.out), static_cast<const T*>(op.y), {}, {}};
    for (int j = 0; j < op.terms; ++j) {
      terms.k[j] = static_cast<const T*>(op.k[j]);
      terms.w[j] = static_cast<arithmetic_t<T>>(op.w[j]);
    }
    sum_rows(layout, op.terms, terms, op.dt);
  });
}

void stage_vjp(const Layout& layout, const StageVjp& op) {
  with_scalar(layout.scalar, [&](auto kind) {
    using T = decltype(kind);
    using A = arithmetic_t<T>;
    const T* g = static_cast<const T*>(op.g);
    const int64_t total = layout.samples * layout.size;
    parallel_for((total + kChunk - 1) / kChunk, threads_for(layout), [&](int64_t chunk) {
      const int64_t begin = chunk * kChunk, end = begin + kChunk < total ? begin + kChunk : total;
      if (layout.samples > 1 && layout.size < kSmallRow) {
        A steps[kBlock];
        for (int64_t from = begin; from < end; from += kBlock) {
          const int64_t to = from + kBlock < end ? from + kBlock : end;
          fill_steps(layout.size, op.dt, from, to, steps);
          for (int j = 0; j < op.terms; ++j) {
            T* out = static_cast<T*>(op.out[j]);
            const A w = static_cast<A>(op.w[j]);
            PYODE_INDEPENDENT
            for (int64_t i = from; i < to; ++i) out[i] = store<T>(steps[i - from] * w * load(g[i]));
          }
        }
        return;
      }
      for_each_row(begin, end, layout.size, [&](int64_t b, int64_t from, int64_t to) {
        const A dt = static_cast<A>(op.dt[b]);
        for (int j = 0; j < op.terms; ++j) {
          T* out = static_cast<T*>(op.out[j]);
          const A factor = dt * static_cast<A>(op.w[j]);
          PYODE_INDEPENDENT
          for (int64_t i = from; i < to; ++i) out[i] = store<T>(factor * load(g[i]));
        }
      });
    });
  });
}

}  // namespace pyode::cpu::PYODE_LEVEL
