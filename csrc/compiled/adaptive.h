// The adaptive loop of pyode/stepping/adaptive.py with dynamics compiled in: a block of rows goes through all stages of
// a step before the next one, and only the error norm and the controller see the whole state.
#pragma once

#include "blocks.h"

namespace pyode {
inline namespace PYODE_LEVEL {
namespace compiled {

/// A solve without integrals beside its state.
template <class F>
struct NoIntegrals {
  using T = typename F::T;
  using V = typename F::V;
  static constexpr int64_t most_parts = 64;

  CompiledSolve& solve;
  const typename F::Fixed& fixed_;

  static int64_t workspace(int64_t) { return 0; }
  NoIntegrals(CompiledSolve& s, int64_t, const typename F::Fixed& fixed, void*) : solve(s), fixed_(fixed) {}
  template <class Rows>
  void start(const Rows&) {}
  void clear(int64_t, int) {}
  template <class Record>
  void rows(int64_t, int j, T t, const V* y, V* k, const typename F::Timed& timed, Record* record) {
    typename F::Kept passing;
    F::rows(t, y, k, solve.inputs, fixed_, timed, record ? record->kept[j] : passing);
    if (record) memcpy(record->stages[j], y, sizeof record->stages[j]);
  }
  void weigh(int64_t) {}
  double of_step(T) { return 0; }
  double of_values() { return 0; }
  double of_slopes() { return 0; }
  double of_change(T) { return 0; }
  void accept() {}
  int64_t arrival(double) const { return -1; }
  template <class Rows>
  void arrive(const Rows&, int64_t, int64_t, V*) const {}
  template <class Rows>
  void begin(const Rows&, int64_t, V*) const {}
  void finish() const {}
};

/// F is the emitted dynamics, M the emitted tableau, I what is integrated along with the state.
template <class F, class M, class I = NoIntegrals<F>>
class AdaptiveSolve : Blocks<F, I::most_parts> {
  using Base = Blocks<F, I::most_parts>;
  using T = typename F::T;
  using V = typename F::V;
  using Base::blocks;
  using Base::parts;
  using Base::solve;
  using Base::W;
  static constexpr int D = F::size, S = M::evaluations;  // the first stage and f(t1, y1) included
  static constexpr int64_t kStepOperations = (S - 1) * (F::operations + 2 * S * D);
  static constexpr int kArrays = 6;  // of blocks
  // Blocks that take a step together. In a short f each operation waits for the one before it; another block's fill in.
  static constexpr int kAbreast = F::operations + 8 * D <= 128 ? 2 : 1;

 public:
  /// Bytes of memory that it wants.
  static int64_t workspace(CompiledSolve& solve) {
    const Base cut(solve);
    return cut.blocks * kArrays * D * static_cast<int64_t>(sizeof(V)) + I::workspace(cut.parts) +
           solve.grid.n_times * interpolated().n * static_cast<int64_t>(sizeof(T));
  }

  AdaptiveSolve(CompiledSolve& s, void* memory)
      : Base(s), integrals_(s, parts, fixed_, static_cast<V*>(memory) + blocks * kArrays * D) {
    weights_ =
        reinterpret_cast<T*>(static_cast<char*>(memory) + blocks * kArrays * D * sizeof(V) + I::workspace(parts));
    V* free = static_cast<V*>(memory);
    for (V** const array : {&y_, &y1_, &first_, &last_, &rtol_, &atol_}) {
      *array = free;
      free += blocks * D;
    }
  }

  void run() {
    const Grid& grid = solve.grid;
    F::prepare(solve.inputs, fixed_);
    const T t0 = round_and_nudge<T>(output_time(grid, 0, 0), 0);
    first_time_ = t0;
    F::at(t0, solve.inputs, fixed_, timed_[0]);
    const T* const y0 = static_cast<const T*>(solve.y0);
    solve.evaluations = 1;
    integrals_.start(static_cast<Base&>(*this));
    Sample& s = solve.sample;
    s = start_sample(grid, 0);
    this->for_each_part(F::operations, [&](int64_t part) {
      integrals_.clear(part, 0);
      this->for_each_block(part, [&](int64_t b) {
        this->load(y0, b, y_ + b * D);
        integrals_.begin(static_cast<const Base&>(*this), b, y_ + b * D);
        evaluate(part, b, 0, t0, y_ + b * D, first_ + b * D);
        if (solve.rtol_each) this->load(solve.rtol_each, b, rtol_ + b * D);
        if (solve.atol_each) this->load(solve.atol_each, b, atol_ + b * D);
      });
    });
    memcpy(solve.out, y0, sizeof(T) * static_cast<size_t>(solve.rows * D));
    plan_first_step(s);
    // Ctrl-C is looked for at least every few tenths of a second, if an operation takes no more than a nanosecond.
    const int64_t patience = 1 + 200'000'000 / (1 + kStepOperations * solve.rows);
    for (int64_t countdown = patience; s.status == kRunning;) {
      if (--countdown == 0) {
        if (solve.interrupted()) {
          s.status = kInterrupted;
          return;
        }
        countdown = patience;
      }
      take_step(s);
    }
    if (s.status > kRunning) {
      if (s.n_accepted + s.n_rejected == 0) solve.finite_start = is_finite(norm_of(y_)) && is_finite(norm_of(first_));
      for (int64_t i = s.output_end; i < grid.n_times; ++i)
        for (int64_t b = 0; b < blocks; ++b) this->store(y_ + b * D, b, output(i));
    }
    integrals_.finish();
  }

 private:
  V *y_, *y1_, *first_, *last_;  // [blocks, D]: the state, the step's end, f at both
  V *rtol_, *atol_;              // the same, where every number has a tolerance of its own
  T* weights_;                   // of the outputs inside a step, each with those of interpolated()
  T first_time_;                 // that f saw for first_
  bool chained_ = false;         // whether first_ is from the last step
  typename F::Fixed fixed_;
  typename F::Timed timed_[S];
  SquareSums<V> sums_[Base::kMaxParts][F::n_segments];
  I integrals_;

  /// f of a block, in evaluation j of the step under way.
  void evaluate(int64_t part, int64_t b, int j, T t, const V* y, V* k) {
    integrals_.rows(part, j, t, y, k, timed_[j], this->template evaluations<M>(solve.sample.n_accepted, b));
  }

  T* output(int64_t i) { return static_cast<T*>(solve.out) + i * solve.rows * D; }

  void plan_first_step(Sample& s) {
    const Grid& grid = solve.grid;
    const bool given = is_finite(solve.first_step);
    if (given) {
      try_first_step(s, solve.policy, grid, 0, norm_of(y_), norm_of(first_));
      give_first_step(s, grid, 0, solve.first_step);
    } else {
      const auto norm = [&](auto ratio, auto share) {
        return norm_of_ratios([&](int64_t i) { return scaled(i, ratio(i), y_[i], y_[i]); }, 8 * D, share);
      };
      const double size = norm([&](int64_t i) { return y_[i]; }, [&] { return integrals_.of_values(); });
      const double slope = norm([&](int64_t i) { return first_[i]; }, [&] { return integrals_.of_slopes(); });
      try_first_step(s, solve.policy, grid, 0, size, slope);
      const T t = round_and_nudge<T>(s.t + s.dt, 0);
      const V dt = broadcast<V>(static_cast<T>(s.dt));
      F::at(t, solve.inputs, fixed_, timed_[1]);
      this->for_each_part(F::operations, [&](int64_t part) {
        integrals_.clear(part, 1);
        this->for_each_block(part, [&](int64_t b) {
          V trial[D];
          for (int d = 0; d < D; ++d) trial[d] = advance_state(y_[b * D + d], dt, first_[b * D + d]);
          evaluate(part, b, 1, t, trial, last_ + b * D);
        });
      });
      solve.evaluations += 1;
      const double change = norm([&](int64_t i) { return dt * (last_[i] - first_[i]); },
                                 [&] { return integrals_.of_change(static_cast<T>(s.dt)); });
      choose_first_step(s, solve.policy, grid, 0, change);
    }
    plan_step(s, solve.policy, grid, 0);
  }

  /// The error of number i relative to what is tolerated.
  V scaled(int64_t i, V error, V y0, V y1) const {
    const V rtol = solve.rtol_each ? rtol_[i] : broadcast<V>(static_cast<T>(solve.rtol));
    const V atol = solve.atol_each ? atol_[i] : broadcast<V>(static_cast<T>(solve.atol));
    return scaled_error(abs(error), abs(y0), abs(y1), rtol, atol);
  }

  /// The largest root mean square of the segments, and of what has a share() in the norm beside them;
  /// body(part, sums) adds to their sums.
  template <class Body, class Share>
  double norm(int64_t operations, Body body, Share share) {
    this->for_each_part(operations, [&](int64_t part) {
      for (SquareSums<V>& sums : sums_[part]) sums = {};
      body(part, sums_[part]);
    });
    double largest = 0;
    for (int s = 0; s < F::n_segments; ++s) {
      SquareSums<V> sums;
      for (int64_t part = 0; part < parts; ++part) sums.add(sums_[part][s]);
      const int64_t n = solve.rows * (F::segments[s + 1] - F::segments[s]);
      largest = larger(n == 0 ? 0.0 : sums.total() / static_cast<double>(n), largest);
    }
    return std::sqrt(larger(share(), largest));
  }

  /// Adds a block's squares; ratio(d) are its numbers.
  template <class Ratio>
  void add_squares(int64_t b, SquareSums<V>* sums, Ratio ratio) {
    const int n = this->valid(b);
    for (int s = 0; s < F::n_segments; ++s)
      for (int d = F::segments[s]; d < F::segments[s + 1]; ++d) {
        V r = ratio(d);
        if (n < W) {
          T numbers[W];
          memcpy(numbers, &r, sizeof r);
          for (int l = n; l < W; ++l) numbers[l] = 0;
          memcpy(&r, numbers, sizeof r);
        }
        sums[s].add(r);
      }
  }

  template <class Ratio, class Share>
  double norm_of_ratios(Ratio ratio, int64_t operations, Share share) {
    const auto body = [&](int64_t part, SquareSums<V>* sums) {
      this->for_each_block(part, [&](int64_t b) { add_squares(b, sums, [&](int d) { return ratio(b * D + d); }); });
    };
    return norm(operations, body, share);
  }

  double norm_of(const V* x) {
    return norm_of_ratios([x](int64_t i) { return x[i]; }, 2 * D, [] { return 0.0; });
  }

  void take_step(Sample& s) {
    const Grid& grid = solve.grid;
    T times[S] = {};
    for (int j = 1; j < S; ++j) {
      times[j] = stage_time<T>(s, M::c[j - 1]);
      F::at(times[j], solve.inputs, fixed_, timed_[j]);
    }
    const T dt = static_cast<T>(s.dt);
    const Passed passed = outputs_before(s);
    const auto advance = [&](int64_t part, SquareSums<V>* sums) {
      for (int j = 1; j < S; ++j) integrals_.clear(part, j);
      this->template for_each_group<kAbreast>(
          part, [&](int64_t b, auto n) { advance_blocks<n.value>(part, b, times, broadcast<V>(dt), passed, sums); });
      integrals_.weigh(part);
    };
    const double error = norm(kStepOperations + (passed.end - passed.begin) * 2 * S * D, advance,
                              [&] { return integrals_.of_step(dt); });
    solve.evaluations += S - 1;
    const bool was_on_jump = s.on_jump != 0;
    judge_step(s, solve.policy, grid, 0, error);
    plan_step(s, solve.policy, grid, 0);
    if (!s.accepted) return;
    if (solve.tape) note_step(s, was_on_jump);
    first_time_ = times[S - 1];
    chained_ = true;
    swap(y_, y1_);
    swap(first_, last_);
    integrals_.accept();
    if (was_on_jump && s.status == kRunning) restart_behind_jump(s);
  }

  /// Outputs [begin, end), of which those from `inside` on are the step's end.
  struct Passed {
    int64_t begin, inside, end;
  };

  /// Those that the step to take passes if it is accepted, and their weights.
  Passed outputs_before(const Sample& s) {
    constexpr auto used = interpolated();
    Passed passed{s.output_end, s.output_end, s.output_end};
    const double sign = direction(solve.grid, 0);
    for (T* w = weights_; passed.end < solve.grid.n_times; ++passed.end) {
      const double time = output_time(solve.grid, passed.end, 0);
      if (sign * (time - s.t1) > 0) break;
      const double x = time == s.t1 ? 1 : (time - s.t) / s.dt;
      if (x == 1) continue;
      for (int j = 0; j < used.n; ++j)
        *w++ = static_cast<T>(interpolant_weight(M::interpolant[used.at[j]], M::degree, x));
      passed.inside += 1;
    }
    return passed;
  }

  /// All stages of a step for n blocks from b on, and the outputs that it passes: written in vain if it is rejected.
  template <int n>
  void advance_blocks(int64_t part, int64_t b, const T* times, V dt, Passed passed, SquareSums<V>* sums) {
    V k[S][n * D], stage[n * D];
    const int64_t begin = b * D;
    const V* const y = y_ + begin;
    for (int i = 0; i < n * D; ++i) k[0][i] = first_[begin + i];
    evaluate_stages<1, n>(part, b, times, dt, y, k, stage);
    for (int i = 0; i < n * D; ++i) {
      y1_[begin + i] = stage[i];
      last_[begin + i] = k[S - 1][i];
    }
    write_outputs<n>(b, passed, dt, y, k, stage);
    constexpr auto weights = terms_of<T>(M::error);
    for (int a = 0; a < n; ++a)
      add_squares(b + a, sums, [&](int d) {
        const int i = a * D + d;
        const V error = dt * sum_terms<V>(weights, [&](int j) { return k[j][i]; });
        return scaled(begin + i, error, y[i], stage[i]);
      });
  }

  template <int j, int n>
  void evaluate_stages(int64_t part, int64_t b, const T* times, V dt, const V* y, V (*k)[n * D], V* stage) {
    constexpr auto weights = terms_of<T>(M::a[j - 1], j);
    for (int i = 0; i < n * D; ++i)
      stage[i] = advance_state(y[i], dt, sum_terms<V>(weights, [&](int l) { return k[l][i]; }));
    for (int a = 0; a < n; ++a) evaluate(part, b + a, j, times[j], stage + a * D, k[j] + a * D);
    if constexpr (j + 1 < S) evaluate_stages<j + 1, n>(part, b, times, dt, y, k, stage);
  }

  template <int n>
  void write_outputs(int64_t b, Passed passed, V dt, const V* y, const V (*k)[n * D], const V* y1) {
    constexpr auto used = interpolated();
    const T* weights = weights_;
    for (int64_t i = passed.begin; i < passed.inside; ++i, weights += used.n) {
      V w[S], point[n * D];
      for (int j = 0; j < used.n; ++j) w[j] = broadcast<V>(weights[j]);
      for (int l = 0; l < n * D; ++l)
        point[l] = advance_state(y[l], dt, weighted_sum<S>(used.n, w, [&](int j) { return k[used.at[j]][l]; }));
      for (int a = 0; a < n; ++a) this->store(point + a * D, b + a, output(i));
    }
    for (int64_t i = passed.inside; i < passed.end; ++i)
      for (int a = 0; a < n; ++a) this->store(y1 + a * D, b + a, output(i));
  }

  /// The stages that dense output is made of.
  static constexpr Terms<T, S> interpolated() {
    Terms<T, S> used;
    for (int j = 0; j < S; ++j) {
      bool any = false;
      for (int p = 0; p < M::degree; ++p) any = any || M::interpolant[j][p] != 0;
      used.add(any, j);
    }
    return used;
  }

  void note_step(const Sample& s, bool on_jump) {
    const int64_t n = s.n_accepted - 1;
    solve.n_steps = s.n_accepted;
    if (n >= solve.capacity) return;
    for (int64_t b = 0; b < blocks; ++b) memcpy(this->record(n, b), y_ + b * D, sizeof(V) * D);
    solve.steps[n] = {s.t_prev, s.dt_prev, s.t,  static_cast<double>(first_time_), s.output_begin, s.output_end,
                      chained_, on_jump,   n - 1};
  }

  void restart_behind_jump(const Sample& s) {
    const T t = round_and_nudge<T>(s.t, direction(solve.grid, 0) > 0 ? 1 : -1);
    first_time_ = t;
    chained_ = false;
    F::at(t, solve.inputs, fixed_, timed_[0]);
    const int64_t arrived = integrals_.arrival(s.t);
    this->for_each_part(F::operations, [&](int64_t part) {
      integrals_.clear(part, 0);
      this->for_each_block(part, [&](int64_t b) {
        integrals_.arrive(static_cast<const Base&>(*this), arrived, b, y_ + b * D);
        evaluate(part, b, 0, t, y_ + b * D, first_ + b * D);
      });
    });
    solve.evaluations += 1;
  }

  static void swap(V*& a, V*& b) {
    V* const kept = a;
    a = b;
    b = kept;
  }
};

}  // namespace compiled
}  // namespace PYODE_LEVEL
}  // namespace pyode
