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
    if (rows_are_small(layout)) {
      for_small_rows<A>(layout, op.dt, [&](int64_t, int64_t begin, int64_t end, const A* steps) {
        for (int j = 0; j < op.terms; ++j) {
          T* out = static_cast<T*>(op.out[j]);
          const A w = static_cast<A>(op.w[j]);
          PYODE_INDEPENDENT
          for (int64_t i = begin; i < end; ++i) out[i] = store<T>(steps[i - begin] * w * load(g[i]));
        }
      });
      return;
    }
    for_each_chunk(layout, [&](int64_t b, int64_t begin, int64_t end) {
      const A dt = static_cast<A>(op.dt[b]);
      for (int j = 0; j < op.terms; ++j) {
        T* out = static_cast<T*>(op.out[j]);
        const A factor = dt * static_cast<A>(op.w[j]);
        PYODE_INDEPENDENT
        for (int64_t i = begin; i < end; ++i) out[i] = store<T>(factor * load(g[i]));
      }
    });
  });
}

}  // namespace pyode::cpu::PYODE_LEVEL
