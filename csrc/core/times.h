// The times that a solve has to meet: outputs, prescribed ends of steps, discontinuities; and those of a step's stages.
#pragma once

#include "step_state.h"

namespace pyode {

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

inline namespace PYODE_LEVEL {

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

/// +1 or -1: where time goes for sample b.
template <class R = double>
PYODE_HD R direction(const Grid& grid, counts_t<R> b) {
  const flags_t<R> backwards = last_time<R>(grid, b) < first_time<R>(grid, b);
  return backwards ? spread<R>(-1) : spread<R>(1);
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
