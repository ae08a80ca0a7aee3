// The step-size controller of one sample: what the next step is, whether the last one counts, which outputs
// it passed, and when and how the solve ends.
//
// R is double, or a SIMD vector of double for several samples side by side, each with a decision of its own: hence
// `flags ? a : b` in place of branches. One's bits are those of a sample alone.
#pragma once

#include "times.h"

namespace pyode {

/// The step-size controller's constants (Hairer, Norsett, Wanner I, II.4, eq. 4.13; torchdiffeq's names), a digital
/// filter of the errors and sizes of the last steps (Soderlind 2003).
struct Policy {
  double safety, ifactor, dfactor;
  double min_step, max_step;
  double order;       // the error is taken to shrink as dt^order
  double beta[3];     // exponents of the last errors, the newest first, in units of 1 / order: {1, 0, 0} is I control
  double alpha[2];    // exponents of the last ratios of step sizes
  double least_ulps;  // a step has to move t by so many units in the last place
  int64_t cautious;   // no growth right after a rejection
  int64_t max_num_steps;
  int64_t clip;              // the last step ends at the last output time instead of passing it
  int64_t count_per_output;  // max_num_steps bounds the steps to each output, not all
  int64_t resume;            // after a step that a prescribed time cut short go on with at least its whole size
};

constexpr double kEpsilon = 2.220446049250313e-16;  // of double precision
constexpr double kLeastError = 1e-10;               // smaller ones count as this in the filter: 0 would be forever

inline namespace PYODE_LEVEL {

/// A sample at its start, before its first step is chosen.
PYODE_HD Sample start_sample(const Grid& grid, int64_t b) {
  Sample s = {};
  s.t = s.t1 = s.t_prev = output_time(grid, 0, b);
  s.output_end = 1;
  while (s.output_end < grid.n_times && output_time(grid, s.output_end, b) == s.t) s.output_end += 1;
  s.output_begin = s.output_end;
  s.status = s.output_end < grid.n_times ? kRunning : kSuccess;
  s.error1 = s.error2 = 1;
  s.end = last_time(grid, b);
  s.next_output = s.output_end < grid.n_times ? output_time(grid, s.output_end, b) : s.end;
  return s;
}

/// Fixes the step to take, dt: within its bounds, not across a prescribed time, not too small to move t.
template <class R>
PYODE_HD void plan_step(Samples<R>& s, const Policy& policy, const Grid& grid, counts_t<R> b) {
  using Counts = counts_t<R>;
  using Flags = flags_t<R>;
  const Counts none{};
  const Flags too_many = is_running(s) & (s.n_steps >= policy.max_num_steps);
  s.status = too_many ? spread_count<R>(kTooManySteps) : s.status;
  const R sign = direction(s);
  s.dt = sign * smaller(larger(magnitude(s.dt), spread<R>(policy.min_step)), spread<R>(policy.max_step));
  s.dt_whole = s.dt;
  const R least = policy.least_ulps * kEpsilon * magnitude(s.t);
  const Flags moves = (sign * (s.t + s.dt - s.t) > 0) & (magnitude(s.dt) >= least);
  const Counts why = s.non_finite != 0 ? spread_count<R>(kNonFinite) : spread_count<R>(kStepTooSmall);
  s.status = is_running(s) & !moves ? why : s.status;
  const Flags running = is_running(s);
  s.on_jump = none;
  s.dt = running ? s.dt : R{};
  s.t1 = s.t + s.dt;
  if (!any(running)) return;
  if (grid.n_step_t > 0) {
    const Stops<R> step_t(grid.step_t, grid.n_step_t, 1, none, sign);
    s.next_step_t = running ? step_t.skip_passed(s.next_step_t, s.t) : s.next_step_t;
    const R stop = step_t[s.next_step_t];
    const Flags over = running & (s.next_step_t < grid.n_step_t) & (sign * (s.t1 - stop) > 0);
    s.t1 = over ? stop : s.t1;
    s.dt = over ? s.t1 - s.t : s.dt;
  }
  if (grid.n_jump_t > 0) {
    const Stops<R> jump_t(grid.jump_t, grid.n_jump_t, grid.jump_stride, b * grid.jump_sample_stride, sign);
    s.next_jump_t = running ? jump_t.skip_passed(s.next_jump_t, s.t) : s.next_jump_t;
    const R stop = jump_t[s.next_jump_t];
    const Flags over = running & (s.next_jump_t < grid.n_jump_t) & (sign * (s.t1 - stop) >= 0);
    s.t1 = over ? stop : s.t1;
    s.dt = over ? s.t1 - s.t : s.dt;
    s.on_jump = over ? spread_count<R>(1) : none;
  }
  if (policy.clip) {
    const Flags over = running & (sign * (s.t1 - s.end) > 0);
    s.t1 = over ? s.end : s.t1;
    s.dt = over ? s.end - s.t : s.dt;
    s.on_jump = over ? none : s.on_jump;
  }
}

/// The first step's size is given; its sign isn't.
template <class R>
PYODE_HD void give_first_step(Samples<R>& s, const Grid& grid, counts_t<R> b, R size) {
  s.dt = direction<R>(grid, b) * magnitude(size);
}

/// The first guess h0, with which the second derivative is tried (Hairer, Norsett, Wanner I, II.4, steps a to c).
/// `size` and `slope` are the norms of y0 and f(t0, y0), each over atol + rtol |y0|.
template <class R>
PYODE_HD void try_first_step(Samples<R>& s, const Policy& policy, const Grid& grid, counts_t<R> b, R size, R slope) {
  const flags_t<R> wrong = is_running(s) & !(is_finite(size) & is_finite(slope));
  s.status = wrong ? spread_count<R>(kNonFinite) : s.status;
  R h0 = (size < 1e-5) | (slope < 1e-5) ? spread<R>(1e-6) : 0.01 * size / slope;
  if (policy.clip) h0 = smaller(h0, magnitude(s.end - s.t));
  s.dt = direction<R>(grid, b) * h0;
  s.slope = slope;
}

/// The first step from the guess and the change of f over it (steps d to f). `change` is the norm of
/// h0 (f(t0 + h0, y0 + h0 f0) - f0) over the same scale.
template <class R>
PYODE_HD void choose_first_step(Samples<R>& s, const Policy& policy, const Grid& grid, counts_t<R> b, R change) {
  const R h0 = magnitude(s.dt), curvature = change / (h0 * h0);
  const R h1 = (s.slope <= 1e-15) & (curvature <= 1e-15)
                   ? larger(spread<R>(1e-6), h0 * 1e-3)
                   : power(0.01 / larger(s.slope, curvature), spread<R>(1 / policy.order));
  // Where f breaks off nearby h0 will do.
  s.dt = is_finite(change) & (s.dt != 0) ? direction<R>(grid, b) * smaller(100 * h0, h1) : s.dt;
}

/// Whether the next step depends on the last error alone: I control.
PYODE_HD bool is_elementary(const Policy& policy) {
  return policy.beta[1] == 0 && policy.beta[2] == 0 && policy.alpha[0] == 0 && policy.alpha[1] == 0;
}

/// The factor by which a step is too short for the error it had: the error, to the power of -1 / order.
template <class R>
PYODE_HD R fitting_factor(const Policy& policy, R error) {
  return inverse_root(error, policy.order);
}

/// The factor by which the next step is longer than the one just tried, whose scaled error is finite; `fitting` as
/// fitting_factor has it.
template <class R>
PYODE_HD R step_factor(const Samples<R>& s, const Policy& policy, R error, R fitting) {
  const double* const beta = policy.beta;
  const double* const alpha = policy.alpha;
  const bool elementary = is_elementary(policy);
  const flags_t<R> accepted = s.accepted != 0;
  const R most = spread<R>(policy.ifactor);
  R factor{};
  if (elementary || any(!accepted)) {
    // Elementary control never shrinks a step that was accurate enough.
    const R least = error < 1 ? spread<R>(elementary ? 1 : policy.dfactor) : spread<R>(policy.dfactor);
    if (elementary && beta[0] != 1) fitting = accepted ? 1 / power(error, spread<R>(beta[0] / policy.order)) : fitting;
    factor = smaller(most, larger(policy.safety * fitting, least));
  }
  if (!elementary && any(accepted)) {
    const auto filter = [](R x, double exponent) { return power(x, spread<R>(exponent)); };
    const auto over = [](R size, R before) { return before == 0 ? spread<R>(1) : size / before; };
    const R filtered = filter(error, beta[0] / policy.order) * filter(s.error1, beta[1] / policy.order) *
                       filter(s.error2, beta[2] / policy.order) * filter(over(s.dt, s.size1), alpha[0]) *
                       filter(over(s.size1, s.size2), alpha[1]);
    factor = accepted ? smaller(most, larger(policy.safety / filtered, spread<R>(policy.dfactor))) : factor;
  }
  return error == 0 ? most : factor;
}

/// Accepts or rejects the step just tried, from the norm of its scaled error, and proposes the next one's size.
/// A non-finite error rejects and shrinks; at the smallest step it ends the solve. `fitting` is that of
/// fitting_factor.
template <class R>
PYODE_HD void judge_step(Samples<R>& s, const Policy& policy, const Grid& grid, counts_t<R> b, R error, R fitting) {
  using Flags = flags_t<R>;
  using Counts = counts_t<R>;
  const Counts none{}, one = spread_count<R>(1);
  const Flags running = is_running(s), was_rejected = (s.accepted == 0) & (s.dt_prev != 0);
  s.accepted = none;
  s.output_begin = s.output_end;
  if (!any(running)) return;
  const R sign = direction(s);
  const Flags finite = is_finite(error), smallest = magnitude(s.dt) <= policy.min_step;
  const Flags accepted = running & ((error <= 1) | (smallest & finite));
  s.non_finite = running ? (finite ? none : one) : s.non_finite;
  s.accepted = accepted ? one : none;
  s.status = running & smallest & !finite ? spread_count<R>(kNonFinite) : s.status;

  R factor = finite ? step_factor(s, policy, error, fitting) : spread<R>(policy.dfactor);
  if (policy.cautious) factor = was_rejected ? smaller(factor, spread<R>(1)) : factor;
  if (!is_elementary(policy)) {
    s.error2 = accepted ? s.error1 : s.error2;
    s.error1 = accepted ? larger(error, spread<R>(kLeastError)) : s.error1;
    s.size2 = accepted ? s.size1 : s.size2;
  }
  s.size1 = accepted ? s.dt : s.size1;
  s.t_prev = running ? s.t : s.t_prev;
  s.dt_prev = running ? s.dt : s.dt_prev;
  s.dt = running ? s.dt * factor : s.dt;
  if (policy.resume) s.dt = accepted ? sign * larger(magnitude(s.dt), magnitude(s.dt_whole)) : s.dt;
  s.n_steps += running ? one : none;
  s.n_rejected += running & !accepted ? one : none;
  s.n_accepted += s.accepted;
  s.t = accepted ? s.t1 : s.t;
  const Counts last = spread_count<R>(grid.n_times - 1);
  for (Flags passed = accepted & (sign * (s.next_output - s.t) <= 0); any(passed);) {
    s.output_end += passed ? one : none;
    const Flags more = passed & (s.output_end <= last);
    if (any(more)) s.next_output = more ? output_time<R>(grid, more ? s.output_end : none, b) : s.next_output;
    passed = more & (sign * (s.next_output - s.t) <= 0);
  }
  const Flags there = (s.output_end > s.output_begin) | (policy.resume ? s.on_jump != 0 : flags_t<R>{});
  if (policy.count_per_output) s.n_steps = accepted & there ? none : s.n_steps;
  s.status = accepted & (s.output_end > last) ? spread_count<R>(kSuccess) : s.status;
}

template <class R>
PYODE_HD void judge_step(Samples<R>& s, const Policy& policy, const Grid& grid, counts_t<R> b, R error) {
  judge_step(s, policy, grid, b, error, fitting_factor(policy, error));
}

/// What sample b adds to the word of flags, after judge_step and plan_step; `was_on_jump` as before the latter.
template <class R>
PYODE_HD counts_t<R> flags_of(const Samples<R>& s, flags_t<R> was_on_jump) {
  const auto flag = [](flags_t<R> set, int64_t bit) { return set ? spread_count<R>(bit) : counts_t<R>{}; };
  const flags_t<R> accepted = s.accepted != 0;
  return flag(is_running(s), kAnyRunning) | flag(accepted, kAnyAccepted) | flag(!accepted, kAnyStayed) |
         flag(s.output_end > s.output_begin, kAnyOutput) | flag(accepted & was_on_jump, kAnyJump) |
         flag(s.status > int64_t{kRunning}, kAnyFailed);
}

}  // namespace PYODE_LEVEL
}  // namespace pyode
