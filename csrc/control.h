// A control op for one sample: what cpu/control.cpp loops over and cuda/control.cu gives to a thread.
#pragma once

#include "ops.h"

namespace pyode {
inline namespace PYODE_LEVEL {

/// The largest root mean square of the segments for sample b; `means` as error_norm left them.
PYODE_HD double norm_of(const Control& op, const double* means, int64_t b) {
  double largest = 0;
  for (int64_t s = 0; s < op.n_segments; ++s) {
    double mean = 0;
    for (int64_t p = 0; p < op.parts; ++p) mean += means[(s * op.parts + p) * op.state.samples + b];
    largest = larger(mean, largest);
  }
  return sqrt(largest);
}

/// Carries out op.phase for sample b and returns its flags.
template <class T>
PYODE_HD int64_t control_sample(const Control& op, int64_t b) {
  const int64_t B = op.state.samples;
  T* const stage_times = static_cast<T*>(op.stage_times);
  Sample s = load_sample(op.state, b);
  const double norm = norm_of(op, op.means, b);
  const bool was_on_jump = s.on_jump != 0;
  const double given = s.dt;  // for each sample, where first_step is nan
  const int64_t half = op.n_segments * op.parts * B;
  if (op.phase == Phase::try_first || op.phase == Phase::given_first) {
    s = start_sample(op.grid, b);
    try_first_step(s, op.policy, op.grid, b, norm, norm_of(op, op.means + half, b));
  }
  if (op.phase == Phase::try_first) {
    stage_times[b] = round_and_nudge<T>(s.t + s.dt, 0);
    store_sample(op.state, b, s);
    return kAnyRunning;
  }
  if (op.phase == Phase::given_first) s.dt = is_finite(op.first_step) ? op.first_step : given;
  if (op.phase == Phase::choose_first) choose_first_step(s, op.policy, op.grid, b, norm);
  if (op.phase == Phase::judge) judge_step(s, op.policy, op.grid, b, norm);
  plan_step(s, op.policy, op.grid, b);
  for (int i = 0; i < op.n_times; ++i) stage_times[i * B + b] = stage_time<T>(s, op.c[i]);
  store_sample(op.state, b, s);
  return flags_of(s, was_on_jump);
}

}  // namespace PYODE_LEVEL
}  // namespace pyode
