// A control op for one sample, or for the samples in a vector's lanes: what cpu/control.cpp loops over and
// cuda/control.cu gives to a thread.
#pragma once

#include "ops.h"

namespace pyode {
inline namespace PYODE_LEVEL {

/// The largest root mean square of the segments; `part(i)` is the i-th of all their means' parts.
template <class R, class Part>
PYODE_HD R largest_root_mean(const Control& op, Part part) {
  R largest = {};
  for (int64_t s = 0; s < op.n_segments; ++s) {
    R mean = {};
    for (int64_t p = 0; p < op.parts; ++p) mean += part(s * op.parts + p);
    largest = larger(mean, largest);
  }
  return math::sqrt(largest);
}

/// The same for the samples from b on; `means` as error_norm left them.
template <class R>
PYODE_HD R norm_of(const Control& op, const double* means, int64_t b) {
  return largest_root_mean<R>(op, [&](int64_t i) { return read_lanes<R>(&means[i * op.state.samples + b]); });
}

/// The time of the i-th stage of the steps planned, for the samples from b on.
template <class T, class R>
PYODE_HD void write_stage_time(const Control& op, int i, const Samples<R>& s, int64_t b) {
  T* const out = static_cast<T*>(op.stage_times) + i * op.state.samples + b;
  if constexpr (!is_vector<R>) {
    *out = stage_time<T>(s, op.c[i]);
#if defined(PYODE_VECTORS)
  } else if constexpr (std::is_floating_point<T>::value) {
    const auto times = stage_time<Vector<T, sizeof(T) * lanes<R>>>(s, op.c[i]);
    memcpy(out, &times, sizeof times);
#endif
  } else {
    for (int l = 0; l < lanes<R>; ++l) {
      Sample one = {};
      one.t = s.t[l], one.t1 = s.t1[l], one.dt = s.dt[l];
      out[l] = stage_time<T>(one, op.c[i]);
    }
  }
}

/// Judges the step just tried by the samples from b on, which are s, from the norm of its error and its fitting_factor,
/// plans the next one, and returns their flags.
template <class R>
PYODE_HD counts_t<R> judge_and_plan(const Control& op, int64_t b, R error, R fitting, Samples<R>& s) {
  counts_t<R> samples = {};
  for (int l = 1; l < lanes<R>; ++l) math::set_lane(samples, l, int64_t{l});
  samples += b;
  const flags_t<R> was_on_jump = s.on_jump != 0;
  judge_step(s, op.policy, op.grid, samples, error, fitting);
  plan_step(s, op.policy, op.grid, samples);
  return flags_of(s, was_on_jump);
}

/// The same, with their words in memory; `s` is how they stand then.
template <int64_t kKept = 0, class R>
PYODE_HD counts_t<R> control_step(const Control& op, int64_t b, R error, R fitting, Samples<R>& s) {
  s = load_sample<R>(op.state, b);
  const counts_t<R> flags = judge_and_plan(op, b, error, fitting, s);
  store_sample<kKept>(op.state, b, s);
  return flags;
}

/// Carries out one of the phases of the first step for sample b and returns its flags.
template <class T>
PYODE_HD int64_t control_first_step(const Control& op, int64_t b) {
  const int64_t B = op.state.samples;
  Sample s = load_sample(op.state, b);
  const double norm = norm_of<double>(op, op.means, b);
  const double given = s.dt;  // for each sample, where first_step is nan
  const bool was_on_jump = s.on_jump != 0;
  const int64_t half = op.n_segments * op.parts * B;
  if (op.phase == Phase::choose_first) {
    choose_first_step(s, op.policy, op.grid, b, norm);
  } else {
    s = start_sample(op.grid, b);
    try_first_step(s, op.policy, op.grid, b, norm, norm_of<double>(op, op.means + half, b));
  }
  if (op.phase == Phase::try_first) {
    static_cast<T*>(op.stage_times)[b] = round_and_nudge<T>(s.t + s.dt, 0);
    store_sample(op.state, b, s);
    return kAnyRunning;
  }
  if (op.phase == Phase::given_first) give_first_step(s, op.grid, b, is_finite(op.first_step) ? op.first_step : given);
  plan_step(s, op.policy, op.grid, b);
  for (int i = 0; i < op.n_times; ++i) write_stage_time<T>(op, i, s, b);
  store_sample(op.state, b, s);
  return flags_of(s, was_on_jump);
}

/// Carries out op.phase for sample b and returns its flags.
template <class T>
PYODE_HD int64_t control_sample(const Control& op, int64_t b) {
  if (op.phase != Phase::judge) return control_first_step<T>(op, b);
  const double error = norm_of<double>(op, op.means, b);
  Sample s;
  const int64_t flags = control_step(op, b, error, fitting_factor(op.policy, error), s);
  for (int i = 0; i < op.n_times; ++i) write_stage_time<T>(op, i, s, b);
  return flags;
}

}  // namespace PYODE_LEVEL
}  // namespace pyode
