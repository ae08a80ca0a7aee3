// The step-size controller of one sample: what the next step is, whether the last one counts, which outputs
// it passed, and when and how the solve ends.
//
// R is double, or a SIMD vector of double for several samples side by side, each with a decision of its own: hence
// `flags ? a : b` in place of branches. One's bits are those of a sample alone.
#pragma once

#include "side_by_side.h"

namespace pyode {

/// How a sample's solve stands. Python has the sentences (pyode/errors.py).
enum Status : int64_t { kSuccess = 0, kRunning = 1, kStepTooSmall = 2, kTooManySteps = 3, kNonFinite = 4 };

/// What a controller call tells the host about all samples: bits of one word.
constexpr int64_t kAnyRunning = 1;   // some sample wants another step
constexpr int64_t kAnyAccepted = 2;  // some sample's step was accepted
constexpr int64_t kAnyStayed = 4;    // some sample's state stays where it was: rejected, done, or failed
constexpr int64_t kAnyOutput = 8;    // some accepted step passed an output time
constexpr int64_t kAnyJump = 16;     // some accepted step ended on a discontinuity
constexpr int64_t kAnyFailed = 32;   // some sample has failed

/// What goes with R, which is double, or a SIMD vector of double for as many samples side by side: what a comparison
/// gives, and integers.
template <class R>
using flags_t = decltype(R{} < R{});
template <class Flags>
struct CountsFor {
  using type = Flags;
};
template <>
struct CountsFor<bool> {
  using type = int64_t;
};
template <class R>
using counts_t = typename CountsFor<flags_t<R>>::type;

/// One sample of the step state, or several side by side. In memory it is kWords rows of B words of 8 bytes, in this
/// order.
template <class R>
struct Samples {
  R t;            // where the accepted steps have come to
  R dt;           // the step to take, signed; 0: stand still
  R t1;           // where it ends; t + dt but for rounding, exact at a prescribed time
  R t_prev;       // start of the last step tried
  R dt_prev;      // its size
  R dt_whole;     // the step to take before a prescribed time cut it short
  R slope;        // first step only: |f(t0, y0)|, scaled
  R size1;        // of the step accepted last; 0 before there is one
  R size2;        // of the one before; this and the errors are kept unless control is by the last error alone
  R error1;       // the scaled error of the step accepted last; 1 before there is one
  R error2;       // of the one before
  R next_output;  // the time of the first output not passed yet; of the last one if all are
  R end;          // of the last output
  counts_t<R> status;
  counts_t<R> accepted;      // whether the last step was
  counts_t<R> output_begin;  // the outputs which the last step passed: [begin, end)
  counts_t<R> output_end;
  counts_t<R> on_jump;     // whether the step to take ends on a discontinuity
  counts_t<R> non_finite;  // whether the last error estimate was inf or nan
  counts_t<R> n_accepted;
  counts_t<R> n_rejected;
  counts_t<R> n_steps;      // since the last output, or since the start: what max_num_steps bounds
  counts_t<R> next_step_t;  // index of the next prescribed step end
  counts_t<R> next_jump_t;  // index of the next discontinuity
};
using Sample = Samples<double>;
constexpr int kWords = static_cast<int>(sizeof(Sample) / 8);
constexpr int kRealWords = 13;
static_assert(sizeof(Sample) == 8 * 24, "Sample is a row of 8-byte words");

/// B samples as kWords rows of B words. In host memory on the CPU, in device memory on CUDA.
struct StepState {
  double* words;
  int64_t samples;
  int64_t stride;  // from row to row: B or more
};

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

/// The times a solve has to meet, all in the direction of integration.
struct Grid {
  const double* times;  // outputs: sample b's i-th is times[i * time_stride + b * sample_stride]; the first is t0
  int64_t n_times, time_stride, sample_stride;
  const double* step_t;  // [n_step_t] steps end here; sorted, in whichever direction, as jump_t is
  int64_t n_step_t;
  const double* jump_t;  // [n_jump_t] and here f is discontinuous
  int64_t n_jump_t;
  int64_t jump_stride = 1, jump_sample_stride = 0;  // as those of times
};

constexpr double kEpsilon = 2.220446049250313e-16;  // of double precision
constexpr double kLeastError = 1e-10;               // smaller ones count as this in the filter: 0 would be forever

/// Sets of words: as bits, the one whose offset in Sample is given, and those that no step changes under I control with
/// no times prescribed but the outputs.
constexpr int64_t word_at(size_t offset) { return int64_t{1} << (offset / 8); }
constexpr int64_t kKeptPlainly = word_at(offsetof(Sample, slope)) | word_at(offsetof(Sample, end)) |
                                 word_at(offsetof(Sample, size2)) | word_at(offsetof(Sample, error1)) |
                                 word_at(offsetof(Sample, error2)) | word_at(offsetof(Sample, on_jump)) |
                                 word_at(offsetof(Sample, next_step_t)) | word_at(offsetof(Sample, next_jump_t));

inline namespace PYODE_LEVEL {

/// Sample b, or for a vector those from b on.
template <class R = double>
PYODE_HD Samples<R> load_sample(const StepState& state, int64_t b) {
  Samples<R> sample;
  char* const words = reinterpret_cast<char*>(&sample);
  PYODE_UNROLL
  for (int i = 0; i < kWords; ++i) memcpy(words + i * sizeof(R), &state.words[i * state.stride + b], sizeof(R));
  return sample;
}

/// All words but those in a set of them.
template <int64_t kBut = 0, class R>
PYODE_HD void store_sample(const StepState& state, int64_t b, const Samples<R>& sample) {
  const char* const words = reinterpret_cast<const char*>(&sample);
  PYODE_UNROLL
  for (int i = 0; i < kWords; ++i)
    if (!(kBut >> i & 1)) memcpy(&state.words[i * state.stride + b], words + i * sizeof(R), sizeof(R));
}

/// 1 if sample b's last step has passed an output, else 0.
PYODE_HD int64_t passes_outputs(const StepState& state, int64_t b) {
  const Sample s = load_sample(state, b);
  return s.output_end > s.output_begin;
}

/// x for every sample.
template <class R>
PYODE_HD R spread(double x) {
  return x - R{};  // x - 0 is x, also for -0
}
template <class R>
PYODE_HD counts_t<R> spread_count(int64_t n) {
  return n + counts_t<R>{};
}

template <class R = double>
PYODE_HD R output_time(const Grid& grid, counts_t<R> i, counts_t<R> b) {
  return read_at<R>(grid.times, i * grid.time_stride + b * grid.sample_stride);
}
template <class R = double>
PYODE_HD R first_time(const Grid& grid, counts_t<R> b) {
  return grid.sample_stride == 0 ? spread<R>(grid.times[0]) : output_time<R>(grid, counts_t<R>{}, b);
}
template <class R = double>
PYODE_HD R last_time(const Grid& grid, counts_t<R> b) {
  const int64_t last = grid.n_times - 1;
  if (grid.sample_stride == 0) return spread<R>(grid.times[last * grid.time_stride]);
  return output_time<R>(grid, spread_count<R>(last), b);
}

template <class R>
PYODE_HD flags_t<R> is_running(const Samples<R>& s) {
  return s.status == int64_t{kRunning};
}

/// +1 or -1: where time goes for sample b.
template <class R = double>
PYODE_HD R direction(const Grid& grid, counts_t<R> b) {
  const flags_t<R> backwards = last_time<R>(grid, b) < first_time<R>(grid, b);
  return backwards ? spread<R>(-1) : spread<R>(1);
}

/// The same from the step to take, which a sample that runs has.
template <class R>
PYODE_HD R direction(const Samples<R>& s) {
  return math::copysign(spread<R>(1), s.dt);
}

/// Prescribed times in the order in which a sample meets them.
template <class R>
struct Stops {
  const double* times;
  int64_t n, stride;  // n >= 1
  counts_t<R> offset, last;
  R sign;
  flags_t<R> reversed;

  PYODE_HD Stops(const double* sorted, int64_t count, int64_t apart, counts_t<R> from, R where)
      : times(sorted), n(count), stride(apart), offset(from), last(spread_count<R>(count - 1)), sign(where) {
    reversed = sign * (read_at<R>(times, last * stride + offset) - read_at<R>(times, offset)) < 0;
  }

  /// The i-th; of those behind the last one, the last.
  PYODE_HD R operator[](counts_t<R> i) const {
    const counts_t<R> within = i > last ? last : i;
    return read_at<R>(times, (reversed ? last - within : within) * stride + offset);
  }

  /// Index of the first, from the i-th on, that lies behind t.
  PYODE_HD counts_t<R> skip_passed(counts_t<R> i, R t) const {
    for (flags_t<R> passed; any(passed = (i < n) & (sign * ((*this)[i] - t) <= 0));) i = passed ? i + 1 : i;
    return i;
  }
};

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

/// The time of a stage with abscissa c of the step to take, rounded to T. At c = 1 it is the neighbour of t1 towards t:
/// just before a discontinuity there.
template <class T, class R>
PYODE_HD T stage_time(const Samples<R>& s, double c) {
  const counts_t<R> one = spread_count<R>(1), none{};
  if (c == 1) return round_and_nudge<T>(s.t1, s.dt > 0 ? -one : (s.dt < 0 ? one : none));
  return round_and_nudge<T>(s.t + c * s.dt, none);
}

/// Where on the last step an output time lies, from 0 to 1; exactly 1 at its end.
template <class R>
PYODE_HD R output_position(const Samples<R>& s, R time) {
  return time == s.t ? spread<R>(1) : (time - s.t_prev) / s.dt_prev;
}

}  // namespace PYODE_LEVEL
}  // namespace pyode
