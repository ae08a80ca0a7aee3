// The step-size controller of one sample: what the next step is, whether the last one counts, which outputs
// it passed, and when and how the solve ends.
#pragma once

#include "common.h"

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

/// One sample of the step state. In memory it is kWords rows of B words of 8 bytes, in this order.
struct Sample {
  double t;         // where the accepted steps have come to
  double dt;        // the step to take, signed; 0: stand still
  double t1;        // where it ends; t + dt but for rounding, exact at a prescribed time
  double t_prev;    // start of the last step tried
  double dt_prev;   // its size
  double dt_whole;  // the step to take before a prescribed time cut it short
  double slope;     // first step only: |f(t0, y0)|, scaled
  double error1;    // the scaled error of the step accepted last; 1 before there is one
  double error2;    // and of the one before
  double size1;     // size of the step accepted last; 0 before there is one
  double ratio1;    // its size over that of the one before; 1 before there are two
  int64_t status;
  int64_t accepted;      // whether the last step was
  int64_t output_begin;  // the outputs which the last step passed: [begin, end)
  int64_t output_end;
  int64_t on_jump;     // whether the step to take ends on a discontinuity
  int64_t non_finite;  // whether the last error estimate was inf or nan
  int64_t n_accepted;
  int64_t n_rejected;
  int64_t n_steps;      // since the last output, or since the start: what max_num_steps bounds
  int64_t next_step_t;  // index of the next prescribed step end
  int64_t next_jump_t;  // index of the next discontinuity
  int64_t rejected;     // whether the step tried last was
};
constexpr int kWords = static_cast<int>(sizeof(Sample) / 8);
constexpr int kRealWords = 11;
static_assert(sizeof(Sample) == 8 * 23, "Sample is a row of 8-byte words");

/// B samples as kWords rows of B words. In host memory on the CPU, in device memory on CUDA.
struct StepState {
  double* words;
  int64_t samples;
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

inline namespace PYODE_LEVEL {

PYODE_HD Sample load_sample(const StepState& state, int64_t b) {
  double words[kWords];
  for (int i = 0; i < kWords; ++i) memcpy(&words[i], &state.words[i * state.samples + b], 8);
  Sample sample;
  memcpy(&sample, words, sizeof sample);
  return sample;
}

PYODE_HD void store_sample(const StepState& state, int64_t b, const Sample& sample) {
  double words[kWords];
  memcpy(words, &sample, sizeof sample);
  for (int i = 0; i < kWords; ++i) memcpy(&state.words[i * state.samples + b], &words[i], 8);
}

PYODE_HD double output_time(const Grid& grid, int64_t i, int64_t b) {
  return grid.times[i * grid.time_stride + b * grid.sample_stride];
}

/// +1 or -1: where time goes for sample b.
PYODE_HD double direction(const Grid& grid, int64_t b) {
  return output_time(grid, grid.n_times - 1, b) < output_time(grid, 0, b) ? -1.0 : 1.0;
}

/// Prescribed times in the order in which a sample meets them.
struct Stops {
  const double* times;
  int64_t n, stride;

  PYODE_HD Stops(const double* sorted, int64_t count, int64_t apart, double sign)
      : times(sorted), n(count), stride(apart) {
    if (n > 1 && sign * (sorted[(n - 1) * stride] - sorted[0]) < 0) {
      times += (n - 1) * stride;
      stride = -stride;
    }
  }

  PYODE_HD double operator[](int64_t i) const { return times[i * stride]; }

  /// Index of the first, from the i-th on, that lies behind t.
  PYODE_HD int64_t skip_passed(int64_t i, double t, double sign) const {
    while (i < n && sign * ((*this)[i] - t) <= 0) ++i;
    return i;
  }
};

/// Fixes the step to take: within its bounds, not across a prescribed time, not too small to move t.
PYODE_HD void plan_step(Sample& s, const Policy& policy, const Grid& grid, int64_t b) {
  if (s.status == kRunning && s.n_steps >= policy.max_num_steps) s.status = kTooManySteps;
  const double sign = direction(grid, b);
  s.dt = sign * smaller(larger(fabs(s.dt), policy.min_step), policy.max_step);
  s.dt_whole = s.dt;
  const double least = policy.least_ulps * kEpsilon * fabs(s.t);
  if (s.status == kRunning && (!(sign * (s.t + s.dt - s.t) > 0) || fabs(s.dt) < least))
    s.status = s.non_finite ? kNonFinite : kStepTooSmall;
  s.on_jump = 0;
  if (s.status != kRunning) {
    s.dt = 0;
    s.t1 = s.t;
    return;
  }
  s.t1 = s.t + s.dt;
  const Stops step_t(grid.step_t, grid.n_step_t, 1, sign);
  const Stops jump_t(grid.jump_t + b * grid.jump_sample_stride, grid.n_jump_t, grid.jump_stride, sign);
  s.next_step_t = step_t.skip_passed(s.next_step_t, s.t, sign);
  s.next_jump_t = jump_t.skip_passed(s.next_jump_t, s.t, sign);
  if (s.next_step_t < step_t.n && sign * (s.t1 - step_t[s.next_step_t]) > 0) {
    s.t1 = step_t[s.next_step_t];
    s.dt = s.t1 - s.t;
  }
  if (s.next_jump_t < jump_t.n && sign * (s.t1 - jump_t[s.next_jump_t]) >= 0) {
    s.t1 = jump_t[s.next_jump_t];
    s.dt = s.t1 - s.t;
    s.on_jump = 1;
  }
  const double end = output_time(grid, grid.n_times - 1, b);
  if (policy.clip && sign * (s.t1 - end) > 0) {
    s.t1 = end;
    s.dt = end - s.t;
    s.on_jump = 0;
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
  s.error1 = s.error2 = s.ratio1 = 1;
  return s;
}

/// The first guess h0, with which the second derivative is tried (Hairer, Norsett, Wanner I, II.4, steps a to c).
/// `size` and `slope` are the norms of y0 and f(t0, y0), each over atol + rtol |y0|.
PYODE_HD void try_first_step(Sample& s, const Policy& policy, const Grid& grid, int64_t b, double size, double slope) {
  if (s.status == kRunning && (!is_finite(size) || !is_finite(slope))) s.status = kNonFinite;
  double h0 = (size < 1e-5 || slope < 1e-5) ? 1e-6 : 0.01 * size / slope;
  if (policy.clip) h0 = smaller(h0, fabs(output_time(grid, grid.n_times - 1, b) - s.t));
  s.dt = direction(grid, b) * h0;
  s.slope = slope;
}

/// The first step from the guess and the change of f over it (steps d to f). `change` is the norm of
/// h0 (f(t0 + h0, y0 + h0 f0) - f0) over the same scale.
PYODE_HD void choose_first_step(Sample& s, const Policy& policy, const Grid& grid, int64_t b, double change) {
  if (!is_finite(change) || s.dt == 0) return;  // f breaks off nearby: h0 will do
  const double h0 = fabs(s.dt), curvature = change / (h0 * h0);
  const double h1 = (s.slope <= 1e-15 && curvature <= 1e-15) ? larger(1e-6, h0 * 1e-3)
                                                             : pow(0.01 / larger(s.slope, curvature), 1 / policy.order);
  s.dt = direction(grid, b) * smaller(100 * h0, h1);
}

/// The factor by which the next step is longer than the one just tried, whose scaled error is finite.
PYODE_HD double step_factor(const Sample& s, const Policy& policy, double error) {
  if (error == 0) return policy.ifactor;
  const double* const beta = policy.beta;
  const double* const alpha = policy.alpha;
  const bool integrating = beta[1] == 0 && beta[2] == 0 && alpha[0] == 0 && alpha[1] == 0;
  if (integrating || !s.accepted) {
    // Elementary control never shrinks a step that was accurate enough.
    const double least = integrating && error < 1 ? 1.0 : policy.dfactor;
    return smaller(policy.ifactor,
                   larger(policy.safety / pow(error, (s.accepted ? beta[0] : 1) / policy.order), least));
  }
  const double ratio = s.size1 == 0 ? 1.0 : s.dt / s.size1;
  const double filtered = pow(error, beta[0] / policy.order) * pow(s.error1, beta[1] / policy.order) *
                          pow(s.error2, beta[2] / policy.order) * pow(ratio, alpha[0]) * pow(s.ratio1, alpha[1]);
  return smaller(policy.ifactor, larger(policy.safety / filtered, policy.dfactor));
}

/// Accepts or rejects the step just tried, from the norm of its scaled error, and proposes the next one's size.
/// A non-finite error rejects and shrinks; at the smallest step it ends the solve.
PYODE_HD void judge_step(Sample& s, const Policy& policy, const Grid& grid, int64_t b, double error) {
  s.accepted = 0;
  s.output_begin = s.output_end;
  if (s.status != kRunning) return;
  const double sign = direction(grid, b);
  s.non_finite = !is_finite(error);
  s.accepted = error <= 1 || (fabs(s.dt) <= policy.min_step && !s.non_finite);
  if (s.non_finite && fabs(s.dt) <= policy.min_step) s.status = kNonFinite;

  double factor = s.non_finite ? policy.dfactor : step_factor(s, policy, error);
  if (s.rejected && policy.cautious) factor = smaller(factor, 1);
  s.rejected = !s.accepted;
  if (s.accepted) {
    s.error2 = s.error1;
    s.error1 = larger(error, kLeastError);
    s.ratio1 = s.size1 == 0 ? 1.0 : s.dt / s.size1;
    s.size1 = s.dt;
  }
  s.t_prev = s.t;
  s.dt_prev = s.dt;
  s.dt *= factor;
  s.n_steps += 1;
  if (!s.accepted) {
    s.n_rejected += 1;
    return;
  }
  if (policy.resume) s.dt = sign * larger(fabs(s.dt), fabs(s.dt_whole));
  s.n_accepted += 1;
  s.t = s.t1;
  while (s.output_end < grid.n_times && sign * (output_time(grid, s.output_end, b) - s.t) <= 0) s.output_end += 1;
  if ((s.output_end > s.output_begin || (s.on_jump && policy.resume)) && policy.count_per_output) s.n_steps = 0;
  if (s.output_end == grid.n_times) s.status = kSuccess;
}

/// What sample b adds to the word of flags, after judge_step and plan_step; `was_on_jump` as before the latter.
PYODE_HD int64_t flags_of(const Sample& s, bool was_on_jump) {
  return (s.status == kRunning ? kAnyRunning : 0) | (s.accepted ? kAnyAccepted : kAnyStayed) |
         (s.output_end > s.output_begin ? kAnyOutput : 0) | (s.accepted && was_on_jump ? kAnyJump : 0) |
         (s.status > kRunning ? kAnyFailed : 0);
}

/// The time of a stage with abscissa c of the step to take. At c = 1 it is the neighbour of t1 towards t: just
/// before a discontinuity there.
template <class T>
PYODE_HD T stage_time(const Sample& s, double c) {
  if (c == 1) return round_and_nudge<T>(s.t1, s.dt > 0 ? -1 : (s.dt < 0 ? 1 : 0));
  return round_and_nudge<T>(s.t + c * s.dt, 0);
}

/// Where on the last step an output time lies, from 0 to 1; exactly 1 at its end.
PYODE_HD double output_position(const Sample& s, double time) {
  return time == s.t ? 1.0 : (time - s.t_prev) / s.dt_prev;
}

}  // namespace PYODE_LEVEL
}  // namespace pyode
