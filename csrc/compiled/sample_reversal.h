// The gradient of a solve whose rows had steps of their own: the steps of a block's rows are undone side by side, from
// the last of each to its first, as reversal.h does it.
#pragma once

#include "reversal.h"
#include "rows_side_by_side.h"

namespace pyode {
inline namespace PYODE_LEVEL {
namespace compiled {

/// G is the emitted vector-Jacobian product, M the emitted tableau.
template <class G, class M>
class SampleReversal : SideBySide<G>, Blocks<G, kPartsOfSums<G>> {
  using Sides = SideBySide<G>;
  using Base = Blocks<G, kPartsOfSums<G>>;
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
  using Sums = typename G::Sums;
  static constexpr int S = M::evaluations;
  static constexpr int64_t kStepOperations = W * (S * G::operations + 6 * S * S * D) + 1000;

 public:
  /// Bytes of memory that it wants.
  static int64_t workspace(CompiledSolve& solve) { return Base(solve).parts * static_cast<int64_t>(sizeof(Sums)); }

  SampleReversal(CompiledSolve& s, void* memory) : Base(s), sums_(static_cast<Sums*>(memory)) {}

  void run() {
    G::prepare(solve.inputs, fixed_);
    const int64_t steps_a_row = 1 + solve.n_steps / (solve.rows > 0 ? solve.rows : 1);
    this->for_each_part(kStepOperations / W * steps_a_row, [&](int64_t part) {
      memset(static_cast<void*>(&sums_[part]), 0, sizeof(Sums));
      int64_t spent = 0;
      this->for_each_block(part, [&](int64_t b) { undo_block(b, sums_[part], spent); });
    });
    solve.sample.status = this->interruption.stopped() ? kInterrupted : kSuccess;
    G::collect(sums_, this->parts, totals_);
    G::finish(solve.inputs, fixed_, totals_, solve.gradients);
  }

 private:
  /// The rows of a block on their way back. Lanes without a step to undo stand where they are, with a gradient of 0.
  struct Lanes : StepBack<G, M, V> {
    V y[D], lam[D], slope[D];  // gradients of the state and of f, both at the end of the step to undo
    V left[D];                 // and what arrives at outputs that were not reached, until the last step has been undone
    V of_ends;                 // the gradient of the ends of the steps undone that move with the start
    V first_time;
    Integers row, step, begin, end, chained,
        on_jump;  // step: its index on the tape, -1 for none; [begin, end): its outputs
    Steps steps;
  };

  Sums* sums_;
  typename G::Fixed fixed_;
  typename G::Totals totals_;

  /// How many outputs a row has reached.
  int64_t reached(int64_t row) const { return load_sample({solve.states, solve.rows, solve.rows}, row).output_end; }

  int64_t last_step(int64_t row) const {
    int64_t n;
    memcpy(&n, &solve.states[(kWords + 1) * solve.rows + row], sizeof n);
    return n;
  }

  const T* gradient_at(int64_t i, int64_t row) const {
    return static_cast<const T*>(solve.gradient) + (i * solve.rows + row) * D;
  }

  void undo_block(int64_t b, Sums& sums, int64_t& spent) {
    Lanes x;
    memset(static_cast<void*>(&x), 0, sizeof x);
    x.record = &x.again;
    const int n = this->valid(b);
    for (int l = 0; l < W; ++l) {
      const int64_t row = b * W + (l < n ? l : n - 1);
      x.row.set(l, row);
      x.step.set(l, l < n ? last_step(row) : -1);
      this->set_row(x.y, l, static_cast<const T*>(solve.y0) + row * D);
      const double t0 = output_time(solve.grid, 0, row);
      Sample s = {};
      s.t = s.t1 = t0;
      x.steps.set(l, s);
      x.first_time[l] = static_cast<T>(t0);
      if (l < n)
        for (int64_t i = reached(row); i < solve.grid.n_times; ++i)
          for (int d = 0; d < D; ++d) x.lam[d][l] += gradient_at(i, row)[d];
    }
    memcpy(x.left, x.lam, sizeof x.left);
    while (load_steps(x)) {
      if (this->interruption.after(kStepOperations, spent)) return;
      undo_steps(x, sums);
    }
    for (int l = 0; l < n; ++l) {
      const int64_t row = x.row[l];
      for (int64_t i = 0, n_start = outputs_at_start(row); i < n_start; ++i)
        for (int d = 0; d < D; ++d) x.lam[d][l] += gradient_at(i, row)[d];
      this->get_row(x.lam, l, static_cast<T*>(solve.y0_gradient) + row * D);
      if constexpr (G::has_time) solve.output_time_gradient[row] += lane(x.of_ends, l);
    }
  }

  /// How many outputs, of those that were reached, are the start itself.
  int64_t outputs_at_start(int64_t row) const { return start_sample(solve.grid, row).output_end; }

  /// The steps to undo; whether there are any.
  bool load_steps(Lanes& x) const {
    bool some = false;
    for (int l = 0; l < W; ++l) {
      const int64_t n = x.step[l];
      if (n < 0) {
        Sample s = x.steps.get(l);
        s.dt = 0;  // lam and slope are passed on as they are
        s.t1 = s.t;
        x.steps.set(l, s);
        x.begin.set(l, 0);
        x.end.set(l, 0);
        x.chained.set(l, 0);
        x.on_jump.set(l, 0);
        continue;
      }
      some = true;
      const TapeStep& step = solve.steps[n];
      this->set_row(x.y, l, static_cast<const T*>(solve.tape) + n * D);
      Sample s = {};
      s.t = step.t0;
      s.dt = step.dt;
      s.t1 = step.t1;
      x.steps.set(l, s);
      x.first_time[l] = static_cast<T>(step.first_time);
      x.begin.set(l, step.output_begin);
      x.end.set(l, step.output_end);
      x.chained.set(l, step.chained);
      x.on_jump.set(l, step.on_jump);
    }
    return some;
  }

  void undo_steps(Lanes& x, Sums& sums) const {
    const Samples<R>* const s = x.steps.parts;
    x.dt = this->numbers([&](int h) { return s[h].dt; });
    x.times[0] = x.first_time;
    for (int j = 1; j < S; ++j) x.times[j] = this->stage_times(x.steps, M::c[j - 1]);
    memcpy(x.again.stages[0], x.y, sizeof x.y);
    memset(static_cast<void*>(x.gk), 0, sizeof x.gk);
    memset(static_cast<void*>(x.start), 0, sizeof x.start);
    x.redo_stages(solve.inputs, fixed_);
    const mask_t<V> moving = this->mask([&](int h) { return x.step.parts[h] >= 0; });
    bool evaluated = false;
    if constexpr (G::has_time) {
      evaluated = true;
      x.evaluate(S - 1, solve.inputs, fixed_);
      x.of_start = x.of_size = V{};
      hold_ends(x, moving);
    }
    add_outputs(x);
    if constexpr (G::has_time) x.weigh_size(S - 1);
    for (int d = 0; d < D; ++d) x.gk[S - 1][d] += x.slope[d];
    bool sloped = false;
    for (int d = 0; d < D; ++d) sloped = sloped || any(x.gk[S - 1][d] != 0);
    if (sloped) {
      V lam[D];
      memcpy(lam, x.lam, sizeof lam);
      if (!evaluated) x.evaluate(S - 1, solve.inputs, fixed_);
      x.pull_back(S - 1, x.gk[S - 1], lam, solve.inputs, fixed_, sums);
      for (int d = 0; d < D; ++d) x.lam[d] = moving ? lam[d] : x.lam[d];
    }
    x.undo_stages(x.lam, solve.inputs, fixed_, sums);
    // The first evaluation was the last of the step before, or it is undone here.
    const mask_t<V> chained = this->mask([&](int h) { return x.chained.parts[h] != 0; });
    V own[D];
    bool opening = false;
    for (int d = 0; d < D; ++d) {
      own[d] = chained ? V{} : x.gk[0][d];
      opening = opening || any(own[d] != 0);
      x.slope[d] = chained ? x.gk[0][d] : V{};
    }
    if (opening) x.pull_back(0, own, x.start, solve.inputs, fixed_, sums);
    for (int d = 0; d < D; ++d) x.lam[d] = moving ? x.start[d] : x.lam[d];
    if constexpr (G::has_time) {
      // The end of a step at a discontinuity does not move with the start, nor what comes behind it.
      const mask_t<V> on_jump = this->mask([&](int h) { return x.on_jump.parts[h] != 0; });
      const V of_ends = on_jump ? x.of_start - x.of_size : x.of_ends + x.of_start;
      x.of_ends = moving ? of_ends : x.of_ends;
    }
    for (int l = 0; l < W; ++l)
      if (x.step[l] >= 0) x.step.set(l, solve.steps[x.step[l]].previous);
  }

  /// Outputs that were not reached stand where the rows' last steps end, which are about to be undone.
  void hold_ends(Lanes& x, mask_t<V> moving) const {
    V held[D];
    for (int d = 0; d < D; ++d) {
      held[d] = moving ? x.left[d] : V{};
      x.left[d] = moving ? V{} : x.left[d];
    }
    x.hold_end(held);
  }

  /// What arrives at the outputs that the steps have passed: of each row one at a time.
  void add_outputs(Lanes& x) const {
    while (true) {
      Numbers position;
      V g[D] = {};
      bool some = false;
      for (int l = 0; l < W; ++l) {
        const int64_t i = x.begin[l];
        position.set(l, 0.5);
        if (i >= x.end[l]) continue;
        some = true;
        const Sample s = x.steps.get(l);
        const double time = output_time(solve.grid, i, x.row[l]);
        position.set(l, time == s.t1 ? 1.0 : (time - s.t) / s.dt);
        this->set_row(g, l, gradient_at(i, x.row[l]));
        x.begin.set(l, i + 1);
      }
      if (!some) return;
      for (int d = 0; d < D; ++d) x.start[d] += g[d];
      const auto add = [&](int j, V w) {
        for (int d = 0; d < D; ++d) x.gk[j][d] = fused_multiply_add(x.dt * w, g[d], x.gk[j][d]);
      };
      for_each_output_weight<M, G>(position, add, add);
      if constexpr (G::has_time) move_outputs(x, position, g);
    }
  }

  /// Moves these outputs along the solution.
  void move_outputs(Lanes& x, const Numbers& position, const V* g) const {
    V effect{};
    for_each_output_slope<M, G>(position,
                                [&](int j, V w) { effect = fused_multiply_add(w, effect_of<D>(g, x.k[j]), effect); });
    x.of_start -= effect;
    x.of_size -= this->numbers([&](int h) { return position.parts[h]; }) * effect;
    for (int l = 0; l < W; ++l) {
      const int64_t i = x.begin[l] - 1;  // the output just passed, in lanes that have one
      if (lane(effect, l) != 0) solve.output_time_gradient[i * solve.rows + x.row[l]] += lane(effect, l);
    }
  }
};

}  // namespace compiled
}  // namespace PYODE_LEVEL
}  // namespace pyode
