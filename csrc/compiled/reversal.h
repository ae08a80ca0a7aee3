// The gradient of a solve: its steps undone from the last to the first, as pyode/gradients/checkpoint.py does it. Every
// block goes through the whole solve before the next one; step sizes are constants.
#pragma once

#include <type_traits>

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

/// The sum over the lanes of a number: the upper half on the lower one, again and again.
template <class X>
PYODE_HD number_t<X> over_lanes(X x) {
  constexpr int W = lanes<X>;
  number_t<X> numbers[W];
  memcpy(numbers, &x, sizeof x);
  for (int half = W / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) numbers[l] += numbers[l + half];
  return numbers[0];
}

/// The same for as many numbers as there are lanes, side by side. `size` lanes in a row belong to one of them.
template <int size, class V>
PYODE_HD V over_all_lanes(V* x) {
#if !defined(__clang__)
  constexpr int W = lanes<V>, half = size / 2;
  if constexpr (size > 1) {
    for (int i = 0; i < half; ++i) {
      integer_t<V> low, high;
      for (int l = 0; l < W; ++l) {
        low[l] = l / size * size + l % half + (l % size < half ? 0 : W);
        high[l] = low[l] + half;
      }
      x[i] = __builtin_shuffle(x[i], x[i + half], low) + __builtin_shuffle(x[i], x[i + half], high);
    }
    return over_all_lanes<half>(x);
  }
#endif
  return x[0];
}

/// out[i] = the sum over n parts, `step` apart, and their lanes, always in the same order; read(part) are its N
/// numbers.
template <int N, class Sums, class Read, class T>
PYODE_HD void collect_sums(const Sums* parts, int64_t n, int64_t step, Read read, T* out) {
  using X = std::remove_const_t<std::remove_pointer_t<decltype(read(*parts))>>;
  constexpr int W = lanes<X>;
  const auto of_all_parts = [&](int i) {
    X sum = read(*parts)[i];
    for (int64_t p = 1; p < n; ++p) sum += read(parts[p * step])[i];
    return sum;
  };
  int i = 0;
#if !defined(__clang__)
  for (; W > 1 && i + W <= N; i += W) {
    X sums[W];
    for (int l = 0; l < W; ++l) sums[l] = of_all_parts(i + l);
    const X totals = over_all_lanes<W>(sums);
    memcpy(out + i, &totals, sizeof totals);
  }
#endif
  for (; i < N; ++i) out[i] = over_lanes(of_all_parts(i));
}

/// What moving a state along k does, to whose numbers it gives the gradient g: nothing where that is 0, even to inf.
template <int D, class V>
PYODE_HD V effect_of(const V* g, const V* k) {
  V sum{};
  for (int d = 0; d < D; ++d) sum = g[d] == 0 ? sum : fused_multiply_add(g[d], k[d], sum);
  return sum;
}

/// Into how many parts the rows are cut at most, each with sums of its own.
template <class G>
constexpr int64_t kPartsOfSums = sizeof(typename G::Sums) > 1 << 16 ? 8 : 64;

/// A step of a block of rows on its way back: all that it has computed, and the gradients of that. G is the emitted
/// vector-Jacobian product, M the emitted tableau; Time is T, or V where every row has a step of its own.
template <class G, class M, class Time>
struct StepBack {
  using T = typename G::T;
  using V = typename G::V;
  using Sums = typename G::Sums;
  static constexpr int D = G::size, S = M::evaluations;

  using Record = Evaluations<G, M>;
  Record again;                   // what the step has computed, if it had to be computed again
  const Record* record;           // or was noted
  V k[S][D], gk[S][D], start[D];  // gk, start: the gradients of k, and of the state at the step's start
  V of_start, of_size;            // the gradients of the step's start, its size as it is, and of its size
  V dt;
  Time times[S];
  typename G::Timed timed[S];

  /// Evaluation j again.
  void evaluate(int j, const void* const* inputs, const typename G::Fixed& fixed) {
    G::rows(times[j], again.stages[j], k[j], inputs, fixed, timed[j], again.kept[j]);
  }

  /// For outputs that were not reached, with the gradient g: they are wanted where the step's end is, and it moves.
  void hold_end(const V* g) {
    for (int d = 0; d < D; ++d) {
      const V slope = k[S - 1][d], effect = slope - slope == 0 ? g[d] * slope : V{};
      of_start -= effect;
      of_size -= effect;
    }
  }

  /// All stages again, from the first.
  template <int j = 0>
  void redo_stages(const void* const* inputs, const typename G::Fixed& fixed) {
    if constexpr (j > 0) {
      constexpr auto weights = terms_of<T>(M::a[j - 1], j);
      for (int d = 0; d < D; ++d)
        again.stages[j][d] =
            advance_state(again.stages[0][d], dt, sum_terms<V>(weights, [&](int i) { return k[i][d]; }));
    }
    if constexpr (j + 1 < S) {
      evaluate(j, inputs, fixed);
      redo_stages<j + 1>(inputs, fixed);
    }
  }

  /// Adds g df/dy of evaluation j to `to`, g df/dp to the sums, and g df/dt to the gradients of the step's times.
  void pull_back(int j, const V* g, V* to, const void* const* inputs, const typename G::Fixed& fixed, Sums& sums) {
    V pulled[D];
    G::back(times[j], record->stages[j], g, pulled, inputs, fixed, timed[j], record->kept[j], sums);
    for (int d = 0; d < D; ++d) to[d] += pulled[d];
    if constexpr (G::has_time) {
      V& of_time = G::time(sums);
      of_start += of_time;
      if (j > 0) of_size += broadcast<V>(static_cast<T>(M::c[j - 1])) * of_time;
      of_time = V{};
    }
  }

  /// Adds what the size of the step does in its sums of k[j], to which they give the gradient gk[j].
  void weigh_size(int j) { of_size += dt == 0 ? V{} : effect_of<D>(gk[j], k[j]) / dt; }

  /// The gradient of y + dt sum_j w_j k_j goes to y and to every k_j.
  template <int N>
  void spread_gradient(const Terms<T, N>& weights, const V* g) {
    for (int d = 0; d < D; ++d) start[d] += g[d];
    for (int i = 0; i < weights.n; ++i) {
      const V w = dt * broadcast<V>(weights.w[i]);
      V* const to = gk[weights.at[i]];
      for (int d = 0; d < D; ++d) to[d] = fused_multiply_add(w, g[d], to[d]);
    }
  }

  /// From the gradient of the step's end to that of its start and of k[0].
  void undo_stages(const V* end, const void* const* inputs, const typename G::Fixed& fixed, Sums& sums) {
    spread_gradient(terms_of<T>(M::a[S - 2], S - 1), end);
    undo_stage<S - 2>(inputs, fixed, sums);
  }

 private:
  template <int j>
  void undo_stage(const void* const* inputs, const typename G::Fixed& fixed, Sums& sums) {
    if constexpr (j > 0) {
      V g[D] = {};
      pull_back(j, gk[j], g, inputs, fixed, sums);
      spread_gradient(terms_of<T>(M::a[j - 1], j), g);
      undo_stage<j - 1>(inputs, fixed, sums);
    }
    if constexpr (G::has_time) weigh_size(j);
  }
};

/// G is the emitted vector-Jacobian product, M the emitted tableau.
template <class G, class M>
class Reversal : Blocks<G, kPartsOfSums<G>> {
  using Base = Blocks<G, kPartsOfSums<G>>;
  using T = typename G::T;
  using V = typename G::V;
  using Sums = typename G::Sums;
  using Step = StepBack<G, M, T>;
  using Base::blocks;
  using Base::solve;
  using Base::W;
  static constexpr int D = G::size, S = M::evaluations;
  static constexpr int64_t kStepOperations = W * (S * G::operations + 6 * S * S * D);

 public:
  /// Bytes of memory that it wants.
  static int64_t workspace(CompiledSolve& solve) {
    const auto bytes = static_cast<int64_t>(sizeof(Sums) + sizeof(double) * n_times(solve));
    return Base(solve).parts * bytes + 64;
  }

  Reversal(CompiledSolve& s, void* memory)
      : Base(s), sums_(static_cast<Sums*>(memory)), times_(static_cast<double*>(aligned(sums_ + this->parts))) {}

  void run() {
    G::prepare(solve.inputs, fixed_);
    this->for_each_part(kStepOperations / W * (1 + solve.n_steps), [&](int64_t part) {
      memset(static_cast<void*>(&sums_[part]), 0, sizeof(Sums));
      const Times times = times_of(part);
      for (int64_t i = 0, n = n_times(solve); i < n; ++i) times.outputs[i] = 0;
      int64_t spent = 0;
      this->for_each_block(part, [&](int64_t b) { undo_block(b, sums_[part], times, spent); });
    });
    solve.sample.status = this->interruption.stopped() ? kInterrupted : kSuccess;
    G::collect(sums_, this->parts, totals_);
    G::finish(solve.inputs, fixed_, totals_, solve.gradients);
    if constexpr (G::has_time) collect_times();
  }

 private:
  /// The gradients of the outputs' times and of the steps' ends, of some rows.
  struct Times {
    double *outputs, *ends;
  };

  Sums* sums_;
  double* times_;  // [parts, n_times]
  typename G::Fixed fixed_;
  typename G::Totals totals_;

  /// How many times have a gradient.
  static int64_t n_times(const CompiledSolve& solve) {
    return G::has_time ? solve.grid.n_times + solve.n_steps + 1 : 0;
  }
  Times times_of(int64_t part) const {
    double* const begin = times_ + part * n_times(solve);
    return {begin, begin + solve.grid.n_times};
  }
  void collect_times() const {
    for (int64_t i = 0; i < n_times(solve); ++i) {
      double sum = 0;
      for (int64_t part = 0; part < this->parts; ++part) sum += times_of(part).outputs[i];
      (i < solve.grid.n_times ? solve.output_time_gradient + i : solve.end_gradient + i - solve.grid.n_times)[0] = sum;
    }
  }

  /// What arrives at output i; 0 in the rows that only fill the last block.
  void load_gradient(int64_t i, int64_t b, V* g) const {
    this->load(static_cast<const T*>(solve.gradient) + i * solve.rows * D, b, g);
    this->template blank<D>(b, g);
  }

  void undo_block(int64_t b, Sums& sums, const Times& times, int64_t& spent) {
    // Of the state and of f, both at the end of the step to undo.
    V lam[D] = {}, slope[D] = {}, g[D];
    for (int64_t i = reached(); i < solve.grid.n_times; ++i) {
      load_gradient(i, b, g);
      for (int d = 0; d < D; ++d) lam[d] += g[d];
    }
    Step x;
    for (int64_t n = solve.n_steps; n-- > 0;) {
      if (this->interruption.after(kStepOperations, spent)) return;
      undo_step(n, b, x, lam, slope, sums, times);
    }
    load_gradient(0, b, g);
    for (int d = 0; d < D; ++d) lam[d] += g[d];
    this->store(lam, b, static_cast<T*>(solve.y0_gradient));
  }

  /// How many outputs have been reached; the others are the last state.
  int64_t reached() const { return solve.n_steps == 0 ? 1 : solve.steps[solve.n_steps - 1].output_end; }

  /// Where an output lies in a step, from 0 to 1.
  double position(const TapeStep& step, int64_t i) const {
    const double time = output_time(solve.grid, i, 0);
    return time == step.t1 ? 1.0 : (time - step.t0) / step.dt;
  }

  void undo_step(int64_t n, int64_t b, Step& x, V* lam, V* slope, Sums& sums, const Times& times) const {
    const TapeStep& step = solve.steps[n];
    const bool chained = n + 1 < solve.n_steps && solve.steps[n + 1].chained;
    x.dt = broadcast<V>(static_cast<T>(step.dt));
    x.times[0] = static_cast<T>(step.first_time);
    for (int j = 1; j < S; ++j) x.times[j] = M::stage_time(solve, step, n, j, T{});
    for (int j = 0; j < S; ++j) G::at(x.times[j], solve.inputs, fixed_, x.timed[j]);
    memset(static_cast<void*>(x.gk), 0, sizeof x.gk);
    memset(static_cast<void*>(x.start), 0, sizeof x.start);
    const auto* const noted = this->template evaluations<M>(n, b);
    if (noted) {
      x.record = noted;
    } else {
      if (chained) {  // its last evaluation was the first of the next step
        x.again.kept[S - 1] = x.again.kept[0];
        memcpy(x.k[S - 1], x.k[0], sizeof x.k[0]);
      }
      memcpy(x.again.stages[0], this->record(n, b), sizeof x.again.stages[0]);
      x.redo_stages(solve.inputs, fixed_);
      x.record = &x.again;
    }
    bool sloped = chained, followed = false;  // whether the last evaluation has a gradient, or its value counts
    for (int64_t i = step.output_begin; i < step.output_end; ++i) {
      V g[D];
      load_gradient(i, b, g);
      const double at = position(step, i);
      for (int d = 0; d < D; ++d) x.start[d] += g[d];
      for (int j = 0; j < S; ++j) {
        const V w = x.dt * broadcast<V>(static_cast<T>(M::output_weight(solve, j, at)));
        for (int d = 0; d < D; ++d) x.gk[j][d] = fused_multiply_add(w, g[d], x.gk[j][d]);
      }
      sloped = sloped || (at != 1 && M::output_weight(solve, S - 1, at) != 0);
      followed = followed || M::output_slope(solve, S - 1, at) != 0;
    }
    const bool stands = n + 1 == solve.n_steps && reached() < solve.grid.n_times;
    if (!noted && !chained && (sloped || (G::has_time && (followed || stands))))
      x.evaluate(S - 1, solve.inputs, fixed_);
    if constexpr (G::has_time) {
      x.of_start = x.of_size = V{};
      move_outputs(step, b, x, times.outputs);
      if (stands) x.hold_end(lam);
    }
    if (n + 1 == solve.n_steps || chained)
      for (int d = 0; d < D; ++d) x.gk[S - 1][d] += slope[d];
    if (sloped) x.pull_back(S - 1, x.gk[S - 1], lam, solve.inputs, fixed_, sums);
    x.undo_stages(lam, solve.inputs, fixed_, sums);
    memcpy(lam, x.start, sizeof x.start);
    if (step.chained)
      memcpy(slope, x.gk[0], sizeof x.start);
    else
      x.pull_back(0, x.gk[0], lam, solve.inputs, fixed_, sums);
    if constexpr (G::has_time) {
      times.ends[n] += over_lanes(x.of_start - x.of_size);
      times.ends[n + 1] += over_lanes(x.of_size);
    }
  }

  /// Moves the outputs within a step along the solution, and adds what their shares in k[S - 1] do with its size.
  void move_outputs(const TapeStep& step, int64_t b, Step& x, double* outputs) const {
    for (int64_t i = step.output_begin; i < step.output_end; ++i) {
      V g[D], effect{};
      load_gradient(i, b, g);
      const double at = position(step, i);
      for (int j = 0; j < S; ++j) {
        const double w = M::output_slope(solve, j, at);
        if (w != 0) effect = fused_multiply_add(broadcast<V>(static_cast<T>(w)), effect_of<D>(g, x.k[j]), effect);
      }
      outputs[i] += over_lanes(effect);
      x.of_start -= effect;
      x.of_size -= broadcast<V>(static_cast<T>(at)) * effect;
    }
    x.weigh_size(S - 1);
  }
};

}  // namespace compiled
}  // namespace PYODE_LEVEL
}  // namespace pyode
