// The step-size controller of one sample: what the next step is, whether the last one counts, which outputs
// it passed, and when and how the solve ends.
//
// What happens in every step is generic over R: double, or a vector of doubles, a sample in each lane. One lane's bits
// are those of a sample alone.
#pragma once

#include "vector_math.h"

namespace pyode {

/// How a sample's solve stands. Python has the sentences (pyode/errors.py).
constexpr int64_t kSuccess = 0, kRunning = 1, kStepTooSmall = 2, kTooManySteps = 3, kNonFinite = 4;

/// What a controller call tells the host about all samples: bits of one word.
constexpr int64_t kAnyRunning = 1;   // some sample wants another step
constexpr int64_t kAnyAccepted = 2;  // some sample's step was accepted
constexpr int64_t kAnyStayed = 4;    // some sample's state stays where it was: rejected, done, or failed
constexpr int64_t kAnyOutput = 8;    // some accepted step passed an output time
constexpr int64_t kAnyJump = 16;     // some accepted step ended on a discontinuity
constexpr int64_t kAnyFailed = 32;   // some sample has failed

/// One sample of the step state, or one in every lane. In memory it is kWords rows of B words of 8 bytes, in this
/// order.
template <class R, class I>
struct SampleWords {
  R t;         // where the accepted steps have come to
  R dt;        // the step to take, signed; 0: stand still
  R t1;        // where it ends; t + dt but for rounding, exact at a prescribed time
  R t_prev;    // start of the last step tried
  R dt_prev;   // its size
  R dt_whole;  // the step to take before a prescribed time cut it short
  R size1;     // size of the step accepted last; 0 before there is one
  R slope;     // first step only: |f(t0, y0)|, scaled
  R error1;    // kept for filters: the scaled error of the step accepted last; 1 before there is one
  R error2;    // and of the one before
  R ratio1;    // size1 over the size of the one before; 1 before there are two
  I status;
  I accepted;      // whether the last step was
  I output_begin;  // the outputs which the last step passed: [begin, end)
  I output_end;
  I on_jump;     // whether the step to take ends on a discontinuity
  I non_finite;  // whether the last error estimate was inf or nan
  I n_accepted;
  I n_rejected;
  I n_steps;      // since the last output, or since the start: what max_num_steps bounds
  I rejected;     // whether the step tried last was
  I next_step_t;  // index of the next prescribed step end
  I next_jump_t;  // index of the next discontinuity
};
using Sample = SampleWords<double, int64_t>;
constexpr int kWords = static_cast<int>(sizeof(Sample) / 8);
static_assert(sizeof(Sample) == 8 * 23, "Sample is a row of 8-byte words");

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
  int64_t n_times, time_stride, sample_stride;  // the latter is 0 or 1
  const double* step_t;  // [n_step_t] steps end here; sorted, in whichever direction, as jump_t is
  int64_t n_step_t;
  const double* jump_t;  // [n_jump_t] and here f is discontinuous
  int64_t n_jump_t;
  int64_t jump_stride = 1, jump_sample_stride = 0;  // as those of times
};

/// Whether the controller remembers errors and sizes; if not, it is elementary control.
PYODE_HD bool filters(const Policy& policy) {
  return policy.beta[1] != 0 || policy.beta[2] != 0 || policy.alpha[0] != 0 || policy.alpha[1] != 0;
}

constexpr double kEpsilon = 2.220446049250313e-16;  // of double precision
constexpr double kLeastError = 1e-10;               // smaller ones count as this in the filter: 0 would be forever

inline namespace PYODE_LEVEL {

template <class R>
using SampleOf = SampleWords<R, integer_t<R>>;

/// Calls visit(i, word) for the i-th word of a sample. Where kAll is false, without those which only the first step, a
/// controller that filters, and prescribed times need.
template <bool kAll, class Words, class Visit>
PYODE_HD void for_each_word(Words& s, Visit visit) {
  int i = 0;
  const auto each = [&](auto&... words) { (visit(i++, words), ...); };
  each(s.t, s.dt, s.t1, s.t_prev, s.dt_prev, s.dt_whole, s.size1);
  if constexpr (kAll) each(s.slope, s.error1, s.error2, s.ratio1);
  i = 11;
  each(s.status, s.accepted, s.output_begin, s.output_end, s.on_jump, s.non_finite, s.n_accepted, s.n_rejected,
       s.n_steps, s.rejected);
  if constexpr (kAll) each(s.next_step_t, s.next_jump_t);
}

/// Sample b; for a vector those from b on.
template <class R = double, bool kAll = true>
PYODE_HD SampleOf<R> load_sample(const StepState& state, int64_t b) {
  SampleOf<R> sample;
  for_each_word<kAll>(sample,
                      [&](int i, auto& word) { memcpy(&word, &state.words[i * state.stride + b], sizeof word); });
  return sample;
}

template <bool kAll = true, class R>
PYODE_HD void store_sample(const StepState& state, int64_t b, const SampleWords<R, integer_t<R>>& sample) {
  for_each_word<kAll>(sample,
                      [&](int i, const auto& word) { memcpy(&state.words[i * state.stride + b], &word, sizeof word); });
}

/// Whether sample b's last step has passed an output; of the whole sample two words are read.
PYODE_HD bool passes_outputs(const StepState& state, int64_t b) {
  constexpr int64_t row = offsetof(Sample, output_begin) / 8;
  int64_t begin, end;
  memcpy(&begin, &state.words[row * state.stride + b], 8);
  memcpy(&end, &state.words[(row + 1) * state.stride + b], 8);
  return end > begin;
}

PYODE_HD double output_time(const Grid& grid, int64_t i, int64_t b) {
  return grid.times[i * grid.time_stride + b * grid.sample_stride];
}

/// The i-th output time of sample b; for a vector of those from b on.
template <class R>
PYODE_HD R output_times(const Grid& grid, int64_t i, int64_t b) {
  if (grid.sample_stride == 0) return math::broadcast<R>(output_time(grid, i, b));
  R times;
  memcpy(&times, &grid.times[i * grid.time_stride + b], sizeof times);
  return times;
}

/// +1 or -1: where time goes for sample b.
template <class R = double>
PYODE_HD R direction(const Grid& grid, int64_t b) {
  const R first = output_times<R>(grid, 0, b), last = output_times<R>(grid, grid.n_times - 1, b);
  return math::select(last < first, math::broadcast<R>(-1), math::broadcast<R>(1));
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

/// Ends the step to take at the next prescribed time, if it reaches beyond; for each lane in turn.
template <class R>
PYODE_HD void stop_at_prescribed_times(SampleOf<R>& s, const Grid& grid, int64_t b, R direction) {
  for (int i = 0; i < lanes<R>; ++i) {
    if (math::lane(s.status, i) != kRunning) continue;
    const double sign = math::lane(direction, i), t = math::lane(s.t, i);
    const Stops step_t(grid.step_t, grid.n_step_t, 1, sign);
    const Stops jump_t(grid.jump_t + (b + i) * grid.jump_sample_stride, grid.n_jump_t, grid.jump_stride, sign);
    const int64_t step = step_t.skip_passed(math::lane(s.next_step_t, i), t, sign);
    const int64_t jump = jump_t.skip_passed(math::lane(s.next_jump_t, i), t, sign);
    double t1 = math::lane(s.t1, i);
    const bool at_step = step < step_t.n && sign * (t1 - step_t[step]) > 0;
    if (at_step) t1 = step_t[step];
    const bool at_jump = jump < jump_t.n && sign * (t1 - jump_t[jump]) >= 0;
    if (at_jump) t1 = jump_t[jump];
    math::set_lane(s.next_step_t, i, step);
    math::set_lane(s.next_jump_t, i, jump);
    math::set_lane(s.on_jump, i, static_cast<int64_t>(at_jump));
    if (!at_step && !at_jump) continue;
    math::set_lane(s.t1, i, t1);
    math::set_lane(s.dt, i, t1 - t);
  }
}

/// Fixes the step to take: within its bounds, not across a prescribed time, not too small to move t.
template <class R>
PYODE_HD void plan_step(SampleOf<R>& s, const Policy& policy, const Grid& grid, int64_t b) {
  using math::select;
  using I = integer_t<R>;
  const R sign = direction<R>(grid, b);
  s.status = select<I>((s.status == kRunning) & (s.n_steps >= policy.max_num_steps), I{} + kTooManySteps, s.status);
  s.dt =
      sign * smaller(larger(math::abs(s.dt), math::broadcast<R>(policy.min_step)), math::broadcast<R>(policy.max_step));
  s.dt_whole = s.dt;
  const R least = policy.least_ulps * kEpsilon * math::abs(s.t);
  const mask_t<R> moves = sign * (s.t + s.dt - s.t) > 0;  // not if dt is nan
  const mask_t<R> too_small = (!moves) | (math::abs(s.dt) < least);
  s.status = select<I>((s.status == kRunning) & too_small,
                       select<I>(s.non_finite != 0, I{} + kNonFinite, I{} + kStepTooSmall), s.status);
  s.on_jump = I{};
  s.t1 = s.t + s.dt;
  if (grid.n_step_t > 0 || grid.n_jump_t > 0) stop_at_prescribed_times(s, grid, b, sign);
  if (policy.clip) {
    const R end = output_times<R>(grid, grid.n_times - 1, b);
    const mask_t<R> beyond = sign * (s.t1 - end) > 0;
    s.t1 = select(beyond, end, s.t1);
    s.dt = select(beyond, end - s.t, s.dt);
    s.on_jump = select<I>(beyond, I{}, s.on_jump);
  }
  const mask_t<R> running = s.status == kRunning;
  s.dt = select(running, s.dt, R{});
  s.t1 = select(running, s.t1, s.t);
  s.on_jump = select<I>(running, s.on_jump, I{});
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
  const double h1 = (s.slope <= 1e-15 && curvature <= 1e-15)
                        ? larger(1e-6, h0 * 1e-3)
                        : math::pow(0.01 / larger(s.slope, curvature), 1 / policy.order);
  s.dt = direction(grid, b) * smaller(100 * h0, h1);
}

/// Whether the step just tried, with a scaled error of such a norm, is accepted.
template <class R>
PYODE_HD mask_t<R> accepts(const SampleOf<R>& s, const Policy& policy, R error) {
  return (error <= 1) | ((math::abs(s.dt) <= policy.min_step) & (error - error == 0));
}

/// The factor by which the next step is longer than the one just tried.
template <class R>
PYODE_HD R step_factor(const SampleOf<R>& s, const Policy& policy, R error) {
  using math::select;
  const auto limited = [&](R factor, R least) {
    return smaller(math::broadcast<R>(policy.ifactor), larger(factor, least));
  };
  const auto power = [](R x, double exponent) {  // most exponents are 0
    return exponent == 0 ? math::broadcast<R>(1) : math::pow(x, math::broadcast<R>(exponent));
  };
  const double* const beta = policy.beta;
  const double* const alpha = policy.alpha;
  const R least = math::broadcast<R>(policy.dfactor);
  const mask_t<R> accepted = accepts(s, policy, error);
  R factor;
  if (!filters(policy)) {
    const R exponent =
        select(accepted, math::broadcast<R>(beta[0] / policy.order), math::broadcast<R>(1 / policy.order));
    // Elementary control never shrinks a step that was accurate enough.
    factor = limited(policy.safety / math::pow(error, exponent), select(error < 1, math::broadcast<R>(1), least));
  } else {
    const R ratio = select(s.size1 == 0, math::broadcast<R>(1), s.dt / s.size1);
    const R filtered = power(error, beta[0] / policy.order) * power(s.error1, beta[1] / policy.order) *
                       power(s.error2, beta[2] / policy.order) * power(ratio, alpha[0]) * power(s.ratio1, alpha[1]);
    factor = select(accepted, limited(policy.safety / filtered, least),
                    limited(policy.safety / power(error, 1 / policy.order), least));
  }
  factor = select(error == 0, math::broadcast<R>(policy.ifactor), factor);
  factor = select(error - error == 0, factor, least);
  return policy.cautious ? select(s.rejected != 0, smaller(factor, math::broadcast<R>(1)), factor) : factor;
}

/// Counts the output times up to s.t for the lanes that have `moved`.
template <class R>
PYODE_HD void pass_outputs(SampleOf<R>& s, const Grid& grid, int64_t b, R direction, mask_t<R> moved) {
  using I = integer_t<R>;
  while (true) {
    const mask_t<R> left = moved & (s.output_end < grid.n_times);
    const I next = math::select<I>(left, s.output_end, I{});
    double times[lanes<R>];
    for (int i = 0; i < lanes<R>; ++i) times[i] = output_time(grid, math::lane(next, i), b + i);
    R time;
    memcpy(&time, times, sizeof time);
    moved = left & (direction * (time - s.t) <= 0);
    if (!math::any(moved)) return;
    s.output_end = math::select<I>(moved, s.output_end + 1, s.output_end);
  }
}

/// Accepts or rejects the step just tried, from the norm of its scaled error, and proposes the next one's size.
/// A non-finite error rejects and shrinks; at the smallest step it ends the solve. `factor` is step_factor's.
template <class R>
PYODE_HD void judge_step(SampleOf<R>& s, const Policy& policy, const Grid& grid, int64_t b, R error, R factor) {
  using math::select;
  using I = integer_t<R>;
  const R sign = direction<R>(grid, b);
  const I yes = I{} + 1;
  const mask_t<R> running = s.status == kRunning, finite = error - error == 0;
  const mask_t<R> smallest = math::abs(s.dt) <= policy.min_step;
  const mask_t<R> accepted = running & accepts(s, policy, error);
  s.accepted = select<I>(accepted, yes, I{});
  s.non_finite = select<I>(running, select<I>(finite, I{}, yes), s.non_finite);
  s.status = select<I>(running & smallest & (!finite), I{} + kNonFinite, s.status);

  s.rejected = select<I>(running, select<I>(accepted, I{}, yes), s.rejected);
  if (filters(policy)) {
    s.error2 = select(accepted, s.error1, s.error2);
    s.error1 = select(accepted, larger(error, math::broadcast<R>(kLeastError)), s.error1);
    s.ratio1 = select(accepted, select(s.size1 == 0, math::broadcast<R>(1), s.dt / s.size1), s.ratio1);
  }
  s.size1 = select(accepted, s.dt, s.size1);
  s.t_prev = select(running, s.t, s.t_prev);
  s.dt_prev = select(running, s.dt, s.dt_prev);
  R next = s.dt * factor;
  if (policy.resume) next = select(accepted, sign * larger(math::abs(next), math::abs(s.dt_whole)), next);
  s.dt = select(running, next, s.dt);
  s.n_steps += select<I>(running, yes, I{});
  s.n_accepted += s.accepted;
  s.n_rejected += select<I>(running & (!accepted), yes, I{});
  s.t = select(accepted, s.t1, s.t);
  s.output_begin = s.output_end;
  pass_outputs(s, grid, b, sign, accepted);
  if (policy.count_per_output) {
    mask_t<R> arrived = s.output_end > s.output_begin;
    if (policy.resume) arrived = arrived | (s.on_jump != 0);
    s.n_steps = select<I>(accepted & arrived, I{}, s.n_steps);
  }
  s.status = select<I>(accepted & (s.output_end == grid.n_times), I{} + kSuccess, s.status);
}

template <class R>
PYODE_HD void judge_step(SampleOf<R>& s, const Policy& policy, const Grid& grid, int64_t b, R error) {
  judge_step(s, policy, grid, b, error, step_factor(s, policy, error));
}

/// What a sample adds to the word of flags, after judge_step and plan_step; `was_on_jump` as before the latter.
template <class R>
PYODE_HD integer_t<R> flags_of(const SampleOf<R>& s, integer_t<R> was_on_jump) {
  using I = integer_t<R>;
  const auto flag = [](mask_t<R> set, int64_t bit) { return math::select<I>(set, I{} + bit, I{}); };
  const mask_t<R> accepted = s.accepted != 0;
  return flag(s.status == kRunning, kAnyRunning) | flag(accepted, kAnyAccepted) | flag(!accepted, kAnyStayed) |
         flag(s.output_end > s.output_begin, kAnyOutput) | flag(accepted & (was_on_jump != 0), kAnyJump) |
         flag(s.status > kRunning, kAnyFailed);
}

/// The time of a stage with abscissa c of the step to take. At c = 1 it is the neighbour of t1 towards t: just
/// before a discontinuity there.
template <class T>
PYODE_HD T stage_time(const Sample& s, double c) {
  if (c == 1) return round_and_nudge<T>(s.t1, s.dt > 0 ? -1 : (s.dt < 0 ? 1 : 0));
  return round_and_nudge<T>(s.t + c * s.dt, 0);
}

/// The same for every lane, to out[0], out[1], ...
template <class T, class R>
PYODE_HD void write_stage_times(const SampleOf<R>& s, double c, T* out) {
#if defined(PYODE_VECTORS)
  if constexpr (is_vector<R> && std::is_floating_point<T>::value) {
    using F = Vector<T, sizeof(T) * lanes<R>>;
    F time = math::convert<F>(c == 1 ? s.t1 : s.t + c * s.dt);
    if (c == 1) {
      const auto forwards = math::convert<integer_t<F>>(s.dt > 0), backwards = math::convert<integer_t<F>>(s.dt < 0);
      time = math::neighbour(time, forwards - backwards);  // a mask is -1
    }
    memcpy(out, &time, sizeof time);
    return;
  }
#endif
  for (int i = 0; i < lanes<R>; ++i) {
    Sample one = {};
    one.t = math::lane(s.t, i), one.t1 = math::lane(s.t1, i), one.dt = math::lane(s.dt, i);
    out[i] = stage_time<T>(one, c);
  }
}

/// Where on the last step an output time lies, from 0 to 1; exactly 1 at its end.
PYODE_HD double output_position(const Sample& s, double time) {
  return time == s.t ? 1.0 : (time - s.t_prev) / s.dt_prev;
}

}  // namespace PYODE_LEVEL
}  // namespace pyode
