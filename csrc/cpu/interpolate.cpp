#include "levels.h"
#include "rows.h"

namespace pyode::cpu::PYODE_LEVEL {

void interpolate(const Layout& layout, const Interpolate& op) {
  if (layout.size == 0) return;
  with_scalar(layout.scalar, [&](auto kind) {
    using T = decltype(kind);
    // A big sample is cut into chunks; small samples share one.
    const int64_t cuts = (layout.size + kChunk - 1) / kChunk;
    const int64_t together = layout.size < kChunk ? kChunk / layout.size : 1;
    const int64_t groups = (layout.samples + together - 1) / together;
    parallel_for(groups * cuts, threads_for(layout), [&](int64_t task) {
      const int64_t first = task / cuts * together, begin = task % cuts * kChunk;
      const int64_t last = first + together < layout.samples ? first + together : layout.samples;
      const int64_t end = begin + kChunk < layout.size ? begin + kChunk : layout.size;
      for (int64_t b = first; b < last; ++b) {
        if (!passes_outputs(op.state, b)) continue;
        const Sample s = load_sample(op.state, b);
        for (int64_t i = s.output_begin; i < s.output_end; ++i) {
          const double x = output_position(s, output_time(op.grid, i, b));
          const int64_t row = b * layout.size;
          Terms<T> terms = {
              static_cast<T*>(op.out) + i * op.out_stride + row, static_cast<const T*>(op.y) + row, {}, {}};
          int n = 0;
          for (int j = 0; j < op.terms; ++j) {
            const double w = x == 1 ? op.end[j] : interpolant_weight(op.c[j], op.degree, x);
            if (w == 0) continue;
            terms.k[n] = static_cast<const T*>(op.k[j]) + row;
            terms.w[n++] = static_cast<arithmetic_t<T>>(w);
          }
          sum_row(n, terms, begin, end, s.dt_prev);
        }
      }
    });
  });
}

}  // namespace pyode::cpu::PYODE_LEVEL
