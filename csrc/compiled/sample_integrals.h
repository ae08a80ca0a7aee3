// The continuous adjoint of rows with steps of their own: (y, a) as one state of each, and beside it the integrals of
// a df/dp, to which the steps add that were accepted (pyode/gradients/backsolve_samples.py).
#pragma once

#include "integrals.h"
#include "samples.h"

namespace pyode {
inline namespace PYODE_LEVEL {
namespace compiled {

/// Integrals along a solve of (y, a), and the jumps of the adjoint. G is the emitted vector-Jacobian product with them,
/// M the emitted tableau.
template <class G, class M>
class SampleAdjoint : SideBySide<G> {
  using Sides = SideBySide<G>;
  using Sides::D;
  using Sides::W;
  using typename Sides::Numbers;
  using typename Sides::T;
  using typename Sides::V;
  using Sums = typename G::Sums;
  static constexpr int S = M::evaluations;

  static constexpr int count_weights() {
    int n = 0;
    for (double w : M::end) n += w != 0;
    return n;
  }

 public:
  static constexpr bool in_parts = true;     // which rows a sum is of, and in which order, has to be fixed
  static constexpr int64_t most_parts = 16;  // few, so that lanes find rows to go on with
  static constexpr int evaluations = G::n_gradients > 0 ? count_weights() : 0;

  static int64_t workspace(int64_t parts) { return parts * static_cast<int64_t>(sizeof(Sums)); }

  SampleAdjoint(CompiledSolve& s, int64_t n_parts, void* memory)
      : solve(s), parts(n_parts), sums_(static_cast<Sums*>(memory)) {}

  void start() {
    G::prepare(solve.inputs, fixed_);
    memset(static_cast<void*>(sums_), 0, sizeof(Sums) * parts);
  }

  /// Behind outputs at which some lanes are: y from the forward solve, a with the gradients that arrive.
  template <class Lanes, class Integers>
  void arrive(Lanes& x, const Integers& which) const {
    while (true) {
      Numbers now;
      Integers here = {};
      V g[D] = {};
      bool some = false;
      for (int h = 0; h < Sides::H; ++h) now.parts[h] = x.steps.parts[h].t;
      for (int l = 0; l < W; ++l) {
        const int64_t i = x.arriving[l], at = i * solve.rows + x.row[l];
        if (!which[l] || i < 1 || solve.arrival_times[at] != now[l]) continue;
        this->set_row(x.y, l, static_cast<const T*>(solve.arriving_states) + at * D);
        this->set_row(g, l, static_cast<const T*>(solve.gradient) + at * D);
        x.arriving.set(l, i - 1);
        here.set(l, i);
        some = true;
      }
      if (!some) return;
      for (int d = 0; d < D; ++d) x.y[D + d] += g[d];
      if constexpr (G::has_time) {  // moving an output moves it along f
        V k[D];
        typename G::Kept kept;
        G::rows(this->numbers([&](int h) { return now.parts[h]; }), x.y, k, solve.inputs, fixed_, timed_, kept);
        const V effect = effect_of<D>(g, k);
        for (int l = 0; l < W; ++l) {
          if (here[l] == 0) continue;
          move_time(here[l], x.row[l], lane(effect, l));
          move_time(0, x.row[l], -lane(effect, l));
        }
      }
    }
  }

  /// Adds the shares of the steps that were accepted, of the sizes dt and with evaluations at these times.
  template <class Lanes>
  void add(const Lanes& x, const V* times, V dt, mask_t<V> accepted) {
    if constexpr (G::n_gradients > 0) {
      int one = 0;
      while (one < W && !lane(accepted, one)) ++one;
      if (one < W) add_stage<0>(x, times, dt, accepted, one);
    }
  }

  void finish() {
    G::collect(sums_, parts, totals_);
    G::finish(solve.inputs, fixed_, totals_, solve.gradients);
  }

 private:
  CompiledSolve& solve;
  const int64_t parts;
  Sums* sums_;
  typename G::Fixed fixed_;
  typename G::Timed timed_;
  typename G::Totals totals_;

  void move_time(int64_t i, int64_t row, T effect) const { solve.output_time_gradient[i * solve.rows + row] += effect; }

  /// Adds g df/dp to the sums, and g df/dt to the gradients of the starts of rows.
  template <class Lanes>
  void pull_back(const Lanes& x, V t, const V* y, const V* g, mask_t<V> accepted) {
    V k[D], pulled[D];
    typename G::Kept kept;
    Sums& sums = sums_[x.part];
    G::rows(t, y, k, solve.inputs, fixed_, timed_, kept);
    G::back(t, y, g, pulled, solve.inputs, fixed_, timed_, kept, sums);
    if constexpr (G::has_time) {
      V& of_time = G::time(sums);
      for (int l = 0; l < W; ++l)
        if (lane(accepted, l)) move_time(0, x.row[l], lane(of_time, l));
      of_time = V{};
    }
  }

  /// Evaluation j and those behind it. Lanes without a step stand where one is that has, with a gradient of 0.
  template <int j, class Lanes>
  void add_stage(const Lanes& x, const V* times, V dt, mask_t<V> accepted, int one) {
    if constexpr (M::end[j] != 0) {
      constexpr auto weights = terms_of<T>(M::a[j > 0 ? j - 1 : 0], j);
      const V w = broadcast<V>(static_cast<T>(-M::end[j])) * dt;
      const auto stand = [&](V v) { return accepted ? v : broadcast<V>(lane(v, one)); };
      const auto stage = [&](int d) {
        if constexpr (j == 0)
          return x.y[d];
        else
          return advance_state(x.y[d], dt, sum_terms<V>(weights, [&](int i) { return x.k[i][d]; }));
      };
      V y[D], g[D];
      for (int d = 0; d < D; ++d) {
        y[d] = stand(stage(d));
        g[d] = accepted ? w * stage(D + d) : V{};
      }
      pull_back(x, stand(times[j]), y, g, accepted);
    }
    if constexpr (j + 1 < S) add_stage<j + 1>(x, times, dt, accepted, one);
  }
};

}  // namespace compiled
}  // namespace PYODE_LEVEL
}  // namespace pyode
