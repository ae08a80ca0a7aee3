// The adaptive loop with a step-size controller for every row. Rows lie side by side in the lanes of a block, each with
// its own time and step size; a lane whose row has come to its end takes the next one that waits. So a block runs on
// its own, in the first-level cache, and what a row comes to depends on nobody else.
#pragma once

#include "rows_side_by_side.h"

namespace pyode {
inline namespace PYODE_LEVEL {
namespace compiled {

/// A solve of rows without integrals beside their states, and without outputs at which something arrives.
struct RowsAlone {
  static constexpr bool in_parts = false;  // whoever has lanes to fill takes the next rows that wait
  static constexpr int64_t most_parts = 64;
  static constexpr int evaluations = 0;  // more, of an accepted step

  static int64_t workspace(int64_t) { return 0; }
  RowsAlone(CompiledSolve&, int64_t, void*) {}
  void start() {}
  template <class Lanes, class Integers>
  void arrive(Lanes&, const Integers&) {}
  template <class Lanes, class V, class Mask>
  void add(const Lanes&, const V*, V, Mask) {}
  void finish() {}
};

/// F is the emitted dynamics, M the emitted tableau, I what is integrated along with the rows.
template <class F, class M, class I = RowsAlone>
class SampleSolve : SideBySide<F>, Blocks<F, I::most_parts> {
  using Sides = SideBySide<F>;
  using Base = Blocks<F, I::most_parts>;
  using Base::blocks_a_part;
  using Base::interruption;
  using Base::solve;
  using Sides::D;
  using Sides::H;
  using Sides::W;
  using typename Sides::Counts;
  using typename Sides::Flags;
  using typename Sides::Integers;
  using typename Sides::Numbers;
  using typename Sides::R;
  using typename Sides::Steps;
  using typename Sides::T;
  using typename Sides::V;
  static constexpr int S = M::evaluations;  // the first stage and f(t1, y1) included
  // The last of them the controllers': as long as so many take that do not wait for one another.
  static constexpr int64_t kStepOperations = W * (S - 1) * (F::operations + 2 * S * D) + 20000;
  static constexpr int64_t kNeighbours = 16;  // rows taken at once: threads should not write into the same cache line
  static constexpr int kSpare = W / 8 > 1 ? W / 8 : 1;  // so many idle lanes are filled together

 public:
  static int64_t workspace(CompiledSolve& solve) { return I::workspace(Base(solve).parts); }

  SampleSolve(CompiledSolve& s, void* memory) : Base(s), integrals_(s, this->parts, memory) {}

  void run() {
    F::prepare(solve.inputs, fixed_);
    integrals_.start();
    solve.evaluations = is_finite(solve.first_step) || solve.first_steps ? 1 : 2;
    const int64_t workers = I::in_parts ? this->parts : Base::smaller_of(this->blocks, solve.threads);
    auto body = [&](int64_t part) { work(part); };
    share(interruption, workers, 50 * kStepOperations / W, body);  // how many steps it will be is not known
    solve.sample.status = interruption.stopped() ? kInterrupted : kSuccess;
    integrals_.finish();
  }

 private:
  /// A block at work.
  struct Lanes {
    V y[D], k[S][D], stage[D];  // k[0] is f(t, y), stage at last the step's end
    V first_time;               // that f saw for k[0]
    Steps steps;
    Integers row, busy, chained, jumps, last;  // busy: 1; the last step's index on the tape
    Integers arriving;                         // the output that is the next to arrive
    int64_t part, next, end;                   // [next, end): rows that are this block's and wait
    int idle = W;
  };

  I integrals_;
  typename F::Fixed fixed_;
  typename F::Timed timed_;
  int64_t next_ = 0;  // row that waits and is no block's yet

  T* output(int64_t i, int64_t row) const { return static_cast<T*>(solve.out) + (i * solve.rows + row) * D; }

  void evaluate(V t, const V* y, V* k) const {
    typename F::Kept passing;
    F::rows(t, y, k, solve.inputs, fixed_, timed_, passing);
  }

  void work(int64_t part) {
    Lanes x;
    memset(static_cast<void*>(&x), 0, sizeof x);
    x.part = part;
    x.idle = W;
    bool waiting = true;
    int64_t spent = 0;
    while (!interruption.after(kStepOperations, spent)) {
      if (waiting && x.idle >= kSpare) waiting = fill(x);
      if (x.idle < W)
        take_step(x);
      else if (!waiting)
        return;
    }
  }

  /// Finds rows that wait; whether there are any.
  bool take_rows(Lanes& x) {
    if constexpr (I::in_parts) {
      if (x.end > 0) return false;
      x.next = x.part * blocks_a_part * W;
      x.end = Base::smaller_of(x.next + blocks_a_part * W, solve.rows);
    } else {
      x.next = __atomic_fetch_add(&next_, kNeighbours, __ATOMIC_RELAXED);
      x.end = Base::smaller_of(x.next + kNeighbours, solve.rows);
    }
    return x.next < x.end;
  }

  /// Gives rows that wait to idle lanes, and plans their first steps; whether there may be more.
  bool fill(Lanes& x) {
    Integers fresh = {};
    bool more = true;
    for (int l = 0; l < W && more; ++l) {
      if (x.busy[l]) continue;
      more = x.next < x.end || take_rows(x);
      if (!more) break;
      const int64_t row = x.next++;
      this->set_row(x.y, l, static_cast<const T*>(solve.y0) + row * D);
      x.steps.set(l, start_sample(solve.grid, row));
      x.row.set(l, row);
      x.arriving.set(l, solve.n_arrivals - 1);
      x.jumps.set(l, 0);
      x.chained.set(l, 0);
      x.last.set(l, -1);
      x.busy.set(l, 1);
      fresh.set(l, 1);
      x.idle -= 1;
    }
    if (any(this->mask([&](int h) { return fresh.parts[h] != 0; }))) start(x, fresh);
    return more;
  }

  void start(Lanes& x, const Integers& fresh) {
    integrals_.arrive(x, fresh);
    for (int l = 0; l < W; ++l)
      for (int64_t i = 0; fresh[l] && i < x.steps.get(l).output_end; ++i) this->get_row(x.y, l, output(i, x.row[l]));
    const mask_t<V> which = this->mask([&](int h) { return fresh.parts[h] != 0; });
    Steps steps = x.steps;
    const V t = this->numbers([&](int h) { return steps.parts[h].t; });
    evaluate(t, x.y, x.stage);
    x.first_time = which ? t : x.first_time;
    for (int d = 0; d < D; ++d) x.k[0][d] = which ? x.stage[d] : x.k[0][d];
    plan_first_step(x, steps);
    x.steps.take(fresh, steps);
    finish(x);
  }

  void plan_first_step(Lanes& x, Steps& steps) {
    const Grid& grid = solve.grid;
    const Policy& policy = solve.policy;
    const bool given = is_finite(solve.first_step) || solve.first_steps;
    const auto scale = [&](int d, V v) { return given ? v : scaled(d, v, x.y[d], x.y[d]); };
    const Numbers size = norms([&](int d) { return scale(d, x.y[d]); });
    const Numbers slope = norms([&](int d) { return scale(d, x.k[0][d]); });
    for (int h = 0; h < H; ++h)
      try_first_step(steps.parts[h], policy, grid, x.row.parts[h], size.parts[h], slope.parts[h]);
    if (given) {
      for (int h = 0; h < H; ++h)
        give_first_step(
            steps.parts[h], grid, x.row.parts[h],
            solve.first_steps ? read_at<R>(solve.first_steps, x.row.parts[h]) : spread<R>(solve.first_step));
    } else {
      V change[D];
      const V t = this->numbers([&](int h) { return steps.parts[h].t + steps.parts[h].dt; });
      const V dt = this->numbers([&](int h) { return steps.parts[h].dt; });
      for (int d = 0; d < D; ++d) x.stage[d] = advance_state(x.y[d], dt, x.k[0][d]);
      evaluate(t, x.stage, change);
      const Numbers norm = norms([&](int d) { return scaled(d, dt * (change[d] - x.k[0][d]), x.y[d], x.y[d]); });
      for (int h = 0; h < H; ++h) choose_first_step(steps.parts[h], policy, grid, x.row.parts[h], norm.parts[h]);
    }
    for (int h = 0; h < H; ++h) plan_step(steps.parts[h], policy, grid, x.row.parts[h]);
  }

  /// The error of number d relative to what is tolerated.
  V scaled(int d, V error, V y0, V y1) const {
    const V rtol = broadcast<V>(static_cast<T>(solve.rtol_each ? solve.rtol_each[d] : solve.rtol));
    const V atol = broadcast<V>(static_cast<T>(solve.atol_each ? solve.atol_each[d] : solve.atol));
    return scaled_error(abs(error), abs(y0), abs(y1), rtol, atol);
  }

  /// For every row the largest root mean square of the segments; ratio(d) are its numbers.
  template <class Ratio>
  Numbers norms(Ratio ratio) const {
    Numbers largest = {};
    for (int s = 0; s < F::n_segments; ++s) {
      R sums[H] = {}, wide[H];
      for (int d = F::segments[s]; d < F::segments[s + 1]; ++d) {
        widen(ratio(d), wide);
        for (int h = 0; h < H; ++h) sums[h] = fused_multiply_add(wide[h], wide[h], sums[h]);
      }
      const double n = F::segments[s + 1] - F::segments[s];
      for (int h = 0; h < H && n > 0; ++h) largest.parts[h] = larger(sums[h] / n, largest.parts[h]);
    }
    for (int h = 0; h < H; ++h) largest.parts[h] = sqrt(largest.parts[h]);
    return largest;
  }

  void take_step(Lanes& x) {
    Samples<R>* const s = x.steps.parts;
    V times[S] = {x.first_time};
    for (int j = 1; j < S; ++j) times[j] = this->stage_times(x.steps, M::c[j - 1]);
    const V dt = this->numbers([&](int h) { return s[h].dt; });
    evaluate_stages<1>(times, dt, x);
    constexpr auto weights = terms_of<T>(M::error);
    const Numbers error = norms([&](int d) {
      return scaled(d, dt * sum_terms<V>(weights, [&](int j) { return x.k[j][d]; }), x.y[d], x.stage[d]);
    });
    Counts on_jump[H];
    for (int h = 0; h < H; ++h) {
      on_jump[h] = s[h].on_jump;
      judge_step(s[h], solve.policy, solve.grid, x.row.parts[h], error.parts[h]);
    }
    write_outputs(x, dt);
    const mask_t<V> accepted = this->mask([&](int h) { return s[h].accepted != 0; });
    if (solve.tape) note_steps(x);
    integrals_.add(x, times, dt, accepted);
    for (int h = 0; h < H; ++h) {
      plan_step(s[h], solve.policy, solve.grid, x.row.parts[h]);
      x.chained.parts[h] |= s[h].accepted;
    }
    x.first_time = accepted ? times[S - 1] : x.first_time;
    for (int d = 0; d < D; ++d) {
      x.y[d] = accepted ? x.stage[d] : x.y[d];
      x.k[0][d] = accepted ? x.k[S - 1][d] : x.k[0][d];
    }
    if (solve.grid.n_jump_t > 0) restart_behind_jumps(x, on_jump);
    finish(x);
  }

  template <int j>
  void evaluate_stages(const V* times, V dt, Lanes& x) {
    constexpr auto weights = terms_of<T>(M::a[j - 1], j);
    for (int d = 0; d < D; ++d)
      x.stage[d] = advance_state(x.y[d], dt, sum_terms<V>(weights, [&](int i) { return x.k[i][d]; }));
    evaluate(times[j], x.stage, x.k[j]);
    if constexpr (j + 1 < S) evaluate_stages<j + 1>(times, dt, x);
  }

  /// What the steps just accepted have passed: of each row one output at a time.
  void write_outputs(const Lanes& x, V dt) {
    const Samples<R>* const s = x.steps.parts;
    Integers at;
    for (int h = 0; h < H; ++h) at.parts[h] = s[h].output_begin;
    while (true) {
      Flags passed[H];
      bool some = false;
      for (int h = 0; h < H; ++h) {
        passed[h] = (s[h].accepted != 0) & (at.parts[h] < s[h].output_end);
        some = some || any(passed[h]);
      }
      if (!some) return;
      Numbers position;
      for (int h = 0; h < H; ++h) {
        const R time = output_time<R>(solve.grid, passed[h] ? at.parts[h] : Counts{}, x.row.parts[h]);
        position.parts[h] = output_position(s[h], time);
      }
      V point[D] = {};
      for_each_output_weight<M, F>(
          position,
          [&](int j, V w) {
            for (int d = 0; d < D; ++d) point[d] = fused_multiply_add(w, x.k[j][d], point[d]);
          },
          [&](int j, V w) {
            for (int d = 0; d < D; ++d) point[d] = w == 0 ? point[d] : fused_multiply_add(w, x.k[j][d], point[d]);
          });
      for (int d = 0; d < D; ++d) point[d] = advance_state(x.y[d], dt, point[d]);
      for (int l = 0; l < W; ++l)
        if (passed[l / Sides::N][l % Sides::N]) this->get_row(point, l, output(at[l], x.row[l]));
      for (int h = 0; h < H; ++h) at.parts[h] += passed[h] ? Counts{} + 1 : Counts{};
    }
  }

  void note_steps(Lanes& x) {
    for (int l = 0; l < W; ++l) {
      if (!x.steps.parts[l / Sides::N].accepted[l % Sides::N]) continue;
      const Sample s = x.steps.get(l);
      const int64_t n = __atomic_fetch_add(&solve.n_steps, 1, __ATOMIC_RELAXED);
      if (n < solve.capacity) {
        this->get_row(x.y, l, static_cast<T*>(solve.tape) + n * D);
        solve.steps[n] = {s.t_prev,       s.dt_prev,    s.t,          static_cast<double>(x.first_time[l]),
                          s.output_begin, s.output_end, x.chained[l], s.on_jump,
                          x.last[l]};
      }
      x.last.set(l, n);
    }
  }

  void restart_behind_jumps(Lanes& x, const Counts* on_jump) {
    Integers jumped;
    for (int h = 0; h < H; ++h) {
      const Samples<R>& s = x.steps.parts[h];
      jumped.parts[h] = (on_jump[h] != 0) & (s.accepted != 0) & is_running(s) ? Counts{} + 1 : Counts{};
      x.jumps.parts[h] += jumped.parts[h];
      x.chained.parts[h] &= ~jumped.parts[h];
    }
    const mask_t<V> which = this->mask([&](int h) { return jumped.parts[h] != 0; });
    if (!any(which)) return;
    integrals_.arrive(x, jumped);
    Half<V> parts[H];
    for (int h = 0; h < H; ++h) {
      const Samples<R>& s = x.steps.parts[h];
      parts[h] = round_and_nudge<Half<V>>(s.t, s.dt_prev > 0 ? Counts{} + 1 : Counts{} - 1);
    }
    V t;
    memcpy(&t, parts, sizeof t);
    evaluate(t, x.y, x.stage);
    x.first_time = which ? t : x.first_time;
    for (int d = 0; d < D; ++d) x.k[0][d] = which ? x.stage[d] : x.k[0][d];
  }

  /// Lets go of the rows that have come to their end, or failed: their last states stand for what they did not reach.
  void finish(Lanes& x) {
    Flags done[H];
    bool some = false;
    for (int h = 0; h < H; ++h) {
      done[h] = (x.busy.parts[h] != 0) & !is_running(x.steps.parts[h]);
      some = some || any(done[h]);
    }
    if (!some) return;
    for (int l = 0; l < W; ++l) {
      if (!done[l / Sides::N][l % Sides::N]) continue;
      const Sample s = x.steps.get(l);
      const int64_t row = x.row[l];
      bool finite = true;
      for (int d = 0; d < D; ++d) finite = finite && is_finite(x.y[d][l]) && is_finite(x.k[0][d][l]);
      store_sample({solve.states, solve.rows, solve.rows}, row, s);
      const int64_t evaluations =
          solve.evaluations + (s.n_accepted + s.n_rejected) * (S - 1) + x.jumps[l] + s.n_accepted * I::evaluations;
      const int64_t more[] = {evaluations, x.last[l], finite};
      if (s.status != kSuccess) __atomic_fetch_add(&solve.n_failed, 1, __ATOMIC_RELAXED);
      for (int i = 0; i < kRowWords - kWords; ++i) memcpy(&solve.states[(kWords + i) * solve.rows + row], &more[i], 8);
      for (int64_t i = s.output_end; i < solve.grid.n_times; ++i) this->get_row(x.y, l, output(i, row));
      x.busy.set(l, 0);
      x.idle += 1;
    }
  }
};

}  // namespace compiled
}  // namespace PYODE_LEVEL
}  // namespace pyode
