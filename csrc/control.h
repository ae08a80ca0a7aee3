// A control op for one sample, or for the samples in a vector's lanes: what cpu/control.cpp loops over and
// cuda/control.cu gives to a thread.
#pragma once

#include "ops.h"

namespace pyode {
inline namespace PYODE_LEVEL {

/// The largest root mean square of the segments for the samples from b on; `means` as error_norm left them.
template <class R>
PYODE_HD R norm_of(const Control& op, const double* means, int64_t b) {
  R largest = {};
  for (int64_t s = 0; s < op.n_segments; ++s) {
    R mean = {};
    for (int64_t p = 0; p < op.parts; ++p) {
      R part;
      memcpy(&part, &means[(s * op.parts + p) * op.state.samples + b], sizeof part);
      mean += part;
    }
    largest = larger(mean, largest);
  }
  return math::sqrt(largest);
}

/// Judges the step just tried by the samples from b on, in kVectors of R, plans the next one, and returns their flags.
/// The factors, a long chain of operations each, come first, so that a processor works on several at once.
template <class T, class R, bool kAll, int kVectors = 1>
PYODE_HD integer_t<R> control_step(const Control& op, int64_t b) {
  R errors[kVectors], factors[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    errors[v] = norm_of<R>(op, op.means, b + v * lanes<R>);
    factors[v] = step_factor(load_sample<R, kAll>(op.state, b + v * lanes<R>), op.policy, errors[v]);
  }
  integer_t<R> flags = {};
  for (int v = 0; v < kVectors; ++v, b += lanes<R>) {
    SampleOf<R> s = load_sample<R, kAll>(op.state, b);
    const integer_t<R> was_on_jump = s.on_jump;
    judge_step(s, op.policy, op.grid, b, errors[v], factors[v]);
    plan_step(s, op.policy, op.grid, b);
    for (int i = 0; i < op.n_times; ++i)
      write_stage_times(s, op.c[i], static_cast<T*>(op.stage_times) + i * op.state.samples + b);
    store_sample<kAll>(op.state, b, s);
    flags |= flags_of(s, was_on_jump);
  }
  return flags;
}

/// Carries out one of the phases of the first step for sample b and returns its flags.
template <class T>
PYODE_HD int64_t control_first_step(const Control& op, int64_t b) {
  const int64_t B = op.state.samples;
  T* const stage_times = static_cast<T*>(op.stage_times) + b;
  Sample s = load_sample(op.state, b);
  const double norm = norm_of<double>(op, op.means, b);
  const double given = s.dt;  // for each sample, where first_step is nan
  const int64_t was_on_jump = s.on_jump, half = op.n_segments * op.parts * B;
  if (op.phase == Phase::choose_first) {
    choose_first_step(s, op.policy, op.grid, b, norm);
  } else {
    s = start_sample(op.grid, b);
    try_first_step(s, op.policy, op.grid, b, norm, norm_of<double>(op, op.means + half, b));
  }
  if (op.phase == Phase::try_first) {
    *stage_times = round_and_nudge<T>(s.t + s.dt, 0);
    store_sample(op.state, b, s);
    return kAnyRunning;
  }
  if (op.phase == Phase::given_first) s.dt = is_finite(op.first_step) ? op.first_step : given;
  plan_step(s, op.policy, op.grid, b);
  for (int i = 0; i < op.n_times; ++i) write_stage_times(s, op.c[i], stage_times + i * B);
  store_sample(op.state, b, s);
  return flags_of(s, was_on_jump);
}

/// Carries out op.phase for sample b and returns its flags.
template <class T>
PYODE_HD int64_t control_sample(const Control& op, int64_t b) {
  return op.phase == Phase::judge ? control_step<T, double, true>(op, b) : control_first_step<T>(op, b);
}

}  // namespace PYODE_LEVEL
}  // namespace pyode
