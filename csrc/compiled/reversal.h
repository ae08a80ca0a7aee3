// The gradient of a solve: its steps undone from the last to the first, as pyode/gradients/checkpoint.py does it. Every
// block goes through the whole solve before the next one; step sizes are constants.
#pragma once

#include "blocks.h"
#include "contract.h"

namespace pyode {
inline namespace PYODE_LEVEL {
namespace compiled {

/// sums[n, i, j] += a[n, i] b[n, j], for every lane.
template <int N, int I, int J, class A, class B, class V>
PYODE_HD void add_outer(const A* a, Strides sa, const B* b, Strides sb, V* sums) {
  for (int n = 0; n < N; ++n)
    for (int i = 0; i < I; ++i)
      for (int j = 0; j < J; ++j) {
        V& sum = sums[(n * I + i) * J + j];
        sum = fused_multiply_add(spread<V>(a[n * sa.batch + i * sa.row]), spread<V>(b[n * sb.batch + j * sb.column]),
                                 sum);
      }
}

/// The same over all lanes, for matrices that would be too big with a vector for each number.
template <int N, int I, int J, class V>
PYODE_HD void add_outer_of_lanes(const V* a, Strides sa, const V* b, Strides sb, number_t<V>* sums) {
  using T = number_t<V>;
  constexpr int W = lanes<V>, wide = J / W * W;
  for (int n = 0; n < N; ++n) {
    alignas(64) T columns[W][J];
    for (int j = 0; j < J; ++j) {
      T numbers[W];
      memcpy(numbers, &b[n * sb.batch + j * sb.column], sizeof numbers);
      for (int l = 0; l < W; ++l) columns[l][j] = numbers[l];
    }
    for (int i = 0; i < I; ++i) {
      T factors[W];
      memcpy(factors, &a[n * sa.batch + i * sa.row], sizeof factors);
      T* const row = sums + (n * I + i) * J;
      for (int j = 0; j < wide; j += W) {
        V sum;
        memcpy(&sum, row + j, sizeof sum);
        for (int l = 0; l < W; ++l) {
          V column;
          memcpy(&column, &columns[l][j], sizeof column);
          sum = fused_multiply_add(broadcast<V>(factors[l]), column, sum);
        }
        memcpy(row + j, &sum, sizeof sum);
      }
      for (int j = wide; j < J; ++j)
        for (int l = 0; l < W; ++l) row[j] = fused_multiply_add(factors[l], columns[l][j], row[j]);
    }
  }
}

/// The sum of a number over parts and lanes, always in the same order.
template <class X>
PYODE_HD number_t<X> over_lanes(X x) {
  constexpr int W = lanes<X>;
  number_t<X> numbers[W];
  memcpy(numbers, &x, sizeof x);
  for (int half = W / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) numbers[l] += numbers[l + half];
  return numbers[0];
}

/// Into how many parts the rows are cut at most, each with sums of its own.
template <class G>
constexpr int64_t kPartsOfSums = sizeof(typename G::Sums) > 1 << 16 ? 8 : 64;

/// F is the emitted dynamics, G its emitted vector-Jacobian product, M the emitted tableau.
template <class F, class G, class M>
class Reversal : Blocks<F, kPartsOfSums<G>> {
  using Base = Blocks<F, kPartsOfSums<G>>;
  using T = typename F::T;
  using V = typename F::V;
  using Sums = typename G::Sums;
  using Base::blocks;
  using Base::solve;
  using Base::W;
  static constexpr int D = F::size, S = M::evaluations;
  static constexpr int64_t kStepOperations = W * (S * (F::operations + G::operations) + 6 * S * S * D);

 public:
  /// Bytes of workspace.
  static int64_t workspace(int64_t rows) {
    CompiledSolve solve = {};
    solve.rows = rows;
    return Base(solve).parts * static_cast<int64_t>(sizeof(Sums)) + 64;
  }

  explicit Reversal(CompiledSolve& s) : Base(s) {
    sums_ = reinterpret_cast<Sums*>((reinterpret_cast<uintptr_t>(solve.workspace) + 63) / 64 * 64);
  }

  void run() {
    F::prepare(solve.inputs, fixed_);
    G::prepare(solve.inputs, adjoint_fixed_);
    this->for_each_part(kStepOperations / W * (1 + solve.n_steps), [&](int64_t part) {
      memset(static_cast<void*>(&sums_[part]), 0, sizeof(Sums));
      int64_t spent = 0;
      this->for_each_block(part, [&](int64_t b) { undo_block(b, sums_[part], spent); });
    });
    solve.sample.status = this->interruption.stop ? kInterrupted : kSuccess;
    typename G::Totals totals;
    G::collect(sums_, this->parts, totals);
    G::finish(solve.inputs, adjoint_fixed_, totals, solve.gradients);
  }

 private:
  Sums* sums_;
  typename F::Fixed fixed_;
  typename G::Fixed adjoint_fixed_;

  void evaluate(T t, const V* y, V* k) const {
    typename F::Timed timed;
    F::at(t, solve.inputs, fixed_, timed);
    F::rows(t, y, k, solve.inputs, fixed_, timed);
  }

  /// Adds g df/dy to `to`, and g df/dp to the sums.
  void pull_back(T t, const V* y, const V* g, V* to, Sums& sums) const {
    typename G::Timed timed;
    V pulled[D];
    G::at(t, solve.inputs, adjoint_fixed_, timed);
    G::rows(t, y, g, pulled, solve.inputs, adjoint_fixed_, timed, sums);
    for (int d = 0; d < D; ++d) to[d] += pulled[d];
  }

  /// What arrives at output i; 0 in the rows that only fill the last block.
  void load_gradient(int64_t i, int64_t b, V* g) const {
    this->load(static_cast<const T*>(solve.gradient) + i * solve.rows * D, b, g);
    this->template blank<D>(b, g);
  }

  void undo_block(int64_t b, Sums& sums, int64_t& spent) {
    // Of the state and of f, both at the end of the step to undo.
    V lam[D] = {}, slope[D] = {}, g[D];
    for (int64_t i = solve.steps[solve.n_steps - 1].output_end; i < solve.grid.n_times; ++i) {
      load_gradient(i, b, g);
      for (int d = 0; d < D; ++d) lam[d] += g[d];
    }
    bool sloped = false;
    for (int64_t n = solve.n_steps; n-- > 0;) {
      if (this->interruption.after(kStepOperations, spent)) return;
      undo_step(n, b, lam, slope, sloped, sums);
    }
    load_gradient(0, b, g);
    for (int d = 0; d < D; ++d) lam[d] += g[d];
    this->store(lam, b, static_cast<T*>(solve.y0_gradient));
  }

  void undo_step(int64_t n, int64_t b, V* lam, V* slope, bool& sloped, Sums& sums) const {
    const TapeStep& step = solve.steps[n];
    const V* const y = static_cast<const V*>(solve.tape) + (n * blocks + b) * D;
    const V dt = broadcast<V>(static_cast<T>(step.dt));
    T times[S];
    for (int j = 1; j < S; ++j) times[j] = M::stage_time(solve, step, n, j, T{});
    times[0] = static_cast<T>(step.first_time);
    V k[S][D], stages[S][D], gk[S][D] = {}, start[D] = {};
    memcpy(stages[0], y, sizeof stages[0]);
    redo_stages<0>(times, dt, k, stages);
    for (int64_t i = step.output_begin; i < step.output_end; ++i) {
      V g[D];
      load_gradient(i, b, g);
      const double time = output_time(solve.grid, i, 0);
      const double x = time == step.t1 ? 1.0 : (time - step.t0) / step.dt;
      for (int d = 0; d < D; ++d) start[d] += g[d];
      for (int j = 0; j < S; ++j) {
        const V w = dt * broadcast<V>(static_cast<T>(M::output_weight(solve, j, x)));
        for (int d = 0; d < D; ++d) gk[j][d] = fused_multiply_add(w, g[d], gk[j][d]);
      }
      sloped = sloped || (x != 1 && M::output_weight(solve, S - 1, x) != 0);
    }
    if (n + 1 == solve.n_steps || solve.steps[n + 1].chained)
      for (int d = 0; d < D; ++d) gk[S - 1][d] += slope[d];
    if (sloped) pull_back(times[S - 1], stages[S - 1], gk[S - 1], lam, sums);
    spread_gradient(terms_of<T>(M::a[S - 2], S - 1), dt, lam, start, gk);
    undo_stages<S - 2>(times, dt, stages, gk, start, sums);
    sloped = step.chained;
    memcpy(lam, start, sizeof start);
    if (step.chained)
      memcpy(slope, gk[0], sizeof start);
    else
      pull_back(times[0], y, gk[0], lam, sums);
  }

  /// The gradient of y + dt sum_j w_j k_j goes to y and to every k_j.
  template <int N>
  static void spread_gradient(const Terms<T, N>& weights, V dt, const V* g, V* start, V (*gk)[D]) {
    for (int d = 0; d < D; ++d) start[d] += g[d];
    for (int i = 0; i < weights.n; ++i) {
      const V w = dt * broadcast<V>(weights.w[i]);
      V* const to = gk[weights.at[i]];
      for (int d = 0; d < D; ++d) to[d] = fused_multiply_add(w, g[d], to[d]);
    }
  }

  template <int j>
  void redo_stages(const T* times, V dt, V (*k)[D], V (*stages)[D]) const {
    if constexpr (j > 0) {
      constexpr auto weights = terms_of<T>(M::a[j - 1], j);
      for (int d = 0; d < D; ++d)
        stages[j][d] = advance_state(stages[0][d], dt, sum_terms<V>(weights, [&](int i) { return k[i][d]; }));
    }
    if constexpr (j + 1 < S) {
      evaluate(times[j], stages[j], k[j]);
      redo_stages<j + 1>(times, dt, k, stages);
    }
  }

  template <int j>
  void undo_stages(const T* times, V dt, const V (*stages)[D], V (*gk)[D], V* start, Sums& sums) const {
    if constexpr (j > 0) {
      V g[D] = {};
      pull_back(times[j], stages[j], gk[j], g, sums);
      spread_gradient(terms_of<T>(M::a[j - 1], j), dt, g, start, gk);
      undo_stages<j - 1>(times, dt, stages, gk, start, sums);
    }
  }
};

}  // namespace compiled
}  // namespace PYODE_LEVEL
}  // namespace pyode
