// The loop over a given grid of times with dynamics compiled in: a block of rows goes through the whole solve before
// the next one.
#pragma once

#include "blocks.h"

namespace pyode {
inline namespace PYODE_LEVEL {
namespace compiled {

/// F is the emitted dynamics, M the emitted tableau.
template <class F, class M>
class FixedGridSolve : Blocks<F> {
  using Base = Blocks<F>;
  using T = typename F::T;
  using V = typename F::V;
  using Base::solve;
  static constexpr int D = F::size, S = M::evaluations;  // the last is f(t1, y1), for cubics only

 public:
  /// Bytes of memory: the time-dependent values of all stages would be too many, so every block computes them anew.
  static int64_t workspace(const CompiledSolve&) { return 0; }

  FixedGridSolve(CompiledSolve& s, void*) : Base(s) {}

  void run() {
    F::prepare(solve.inputs, fixed_);
    const int64_t steps = solve.n_ends - 1;
    constexpr int64_t operations = S * (F::operations + 2 * S * D);
    solve.evaluations = (S - 1) * steps;
    this->for_each_part(operations * steps, [&](int64_t part) {
      int64_t spent = 0;
      this->for_each_block(part, [&](int64_t b) { run_block(b, spent); });
    });
    solve.sample.status = this->interruption.stopped() ? kInterrupted : kSuccess;
    solve.sample.n_accepted = steps;
    solve.n_steps = steps;
  }

 private:
  typename F::Fixed fixed_;

  void run_block(int64_t b, int64_t& spent) {
    const double* const ends = solve.ends;
    const Grid& grid = solve.grid;
    const double sign = direction(grid, 0);
    V y[D], y1[D], k[S][D];
    this->load(static_cast<const T*>(solve.y0), b, y);
    write(y, b, 0);
    constexpr int64_t operations = Base::W * S * (F::operations + 2 * S * D);
    int64_t i = 1;
    for (int64_t n = 0; n + 1 < solve.n_ends; ++n) {
      if (this->interruption.after(operations, spent)) return;
      V* const record = this->record(n, b);
      auto* const evaluations = this->template evaluations<M>(n, b);
      if (record) memcpy(record, y, sizeof y);
      const int64_t i_begin = i;
      const double size = ends[n + 1] - ends[n];
      const V dt = broadcast<V>(static_cast<T>(size));
      const T* const times = static_cast<const T*>(solve.stage_times) + n * S;
      evaluate_stages<0>(times, dt, y, k, y1, evaluations);
      bool sloped = false;
      for (; i < grid.n_times && sign * (output_time(grid, i, 0) - ends[n + 1]) < 0; ++i) {
        const double x = (output_time(grid, i, 0) - ends[n]) / size;
        if (solve.cubic && !sloped) {
          evaluate(S - 1, times[S - 1], y1, k[S - 1], evaluations);
          if (b == 0) solve.evaluations += 1;
          sloped = true;
        }
        Terms<T, S> weights;
        for (int j = 0; j < S; ++j) weights.add(M::output_weight(solve, j, x), j);
        V point[D];
        for (int d = 0; d < D; ++d)
          point[d] = advance_state(y[d], dt, sum_terms<V>(weights, [&](int j) { return k[j][d]; }));
        write(point, b, i);
      }
      memcpy(y, y1, sizeof y);
      if (i < grid.n_times && output_time(grid, i, 0) == ends[n + 1]) write(y, b, i++);
      if (record && b == 0)
        solve.steps[n] = {
            ends[n], size, ends[n + 1], static_cast<double>(static_cast<const T*>(solve.stage_times)[n * S]),
            i_begin, i,    false,       false,
            n - 1};
    }
  }

  /// All stages of a step, at last its end.
  template <int j>
  void evaluate_stages(const T* times, V dt, const V* y, V (*k)[D], V* stage, Evaluations<F, M>* evaluations) {
    if constexpr (j > 0) {
      constexpr auto weights = terms_of<T>(M::a[j - 1], j);
      for (int d = 0; d < D; ++d)
        stage[d] = advance_state(y[d], dt, sum_terms<V>(weights, [&](int i) { return k[i][d]; }));
    }
    if constexpr (j + 1 < S) {
      evaluate(j, times[j], j > 0 ? stage : y, k[j], evaluations);
      evaluate_stages<j + 1>(times, dt, y, k, stage, evaluations);
    }
  }

  void evaluate(int j, T t, const V* y, V* k, Evaluations<F, M>* evaluations) {
    typename F::Timed timed;
    typename F::Kept passing;
    F::at(t, solve.inputs, fixed_, timed);
    F::rows(t, y, k, solve.inputs, fixed_, timed, evaluations ? evaluations->kept[j] : passing);
    if (evaluations) memcpy(evaluations->stages[j], y, sizeof evaluations->stages[j]);
  }

  void write(const V* y, int64_t b, int64_t i) { this->store(y, b, static_cast<T*>(solve.out) + i * solve.rows * D); }
};

}  // namespace compiled
}  // namespace PYODE_LEVEL
}  // namespace pyode
