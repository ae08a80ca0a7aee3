// The step state: what is known of each sample's solve, and how it lies in memory.
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

/// Sets of words: as bits, the one whose offset in Sample is given, and those that no step changes under I control with
/// no times prescribed but the outputs.
constexpr int64_t word_at(size_t offset) { return int64_t{1} << (offset / 8); }
constexpr int64_t kKeptPlainly = word_at(offsetof(Sample, slope)) | word_at(offsetof(Sample, end)) |
                                 word_at(offsetof(Sample, size2)) | word_at(offsetof(Sample, error1)) |
                                 word_at(offsetof(Sample, error2)) | word_at(offsetof(Sample, on_jump)) |
                                 word_at(offsetof(Sample, next_step_t)) | word_at(offsetof(Sample, next_jump_t));

inline namespace PYODE_LEVEL {

/// x for every sample.
template <class R>
PYODE_HD R spread(double x) {
  return x - R{};  // x - 0 is x, also for -0
}
template <class R>
PYODE_HD counts_t<R> spread_count(int64_t n) {
  return n + counts_t<R>{};
}

/// Sample b, or for a vector those from b on.
template <class R = double>
PYODE_HD Samples<R> load_sample(const StepState& state, int64_t b) {
  Samples<R> sample;
  char* const words = reinterpret_cast<char*>(&sample);
  PYODE_UNROLL
  for (int i = 0; i < kWords; ++i) {
    const R word = read_lanes<R>(&state.words[i * state.stride + b]);
    memcpy(words + i * sizeof word, &word, sizeof word);
  }
  return sample;
}

/// All words but those in a set of them.
template <int64_t kBut = 0, class R>
PYODE_HD void store_sample(const StepState& state, int64_t b, const Samples<R>& sample) {
  const char* const words = reinterpret_cast<const char*>(&sample);
  PYODE_UNROLL
  for (int i = 0; i < kWords; ++i) {
    if (kBut >> i & 1) continue;
    R word;
    memcpy(&word, words + i * sizeof word, sizeof word);
    write_lanes(&state.words[i * state.stride + b], word);
  }
}

/// 1 if sample b's last step has passed an output, else 0.
PYODE_HD int64_t passes_outputs(const StepState& state, int64_t b) {
  const Sample s = load_sample(state, b);
  return s.output_end > s.output_begin;
}

template <class R>
PYODE_HD flags_t<R> is_running(const Samples<R>& s) {
  return s.status == int64_t{kRunning};
}

/// +1 or -1: where time goes, from the step to take, which a sample that runs has.
template <class R>
PYODE_HD R direction(const Samples<R>& s) {
  return math::copysign(spread<R>(1), s.dt);
}

}  // namespace PYODE_LEVEL
}  // namespace pyode
