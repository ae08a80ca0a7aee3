#include "../control.h"

#include <atomic>

#include "levels.h"
#include "rows.h"

namespace pyode::cpu::PYODE_LEVEL {
namespace {

constexpr int64_t kTogether = 4096;  // samples a thread takes at a time

#if defined(PYODE_VECTORS)
#define PYODE_FLATTEN __attribute__((flatten))
#else
#define PYODE_FLATTEN
#endif

/// Calls body(R{}, b) for the samples in [begin, end), as many as R holds from b on.
template <class Body>
void for_samples(int64_t begin, int64_t end, Body body) {
  for (; begin + lanes<Side> <= end; begin += lanes<Side>) body(Side{}, begin);
  for (; begin < end; ++begin) body(double{}, begin);
}

// Whether control is by the last error alone, one number a sample, and no times but the outputs are prescribed.
bool is_plain(const Control& op) {
  const Policy& policy = op.policy;
  return op.n_segments == 1 && op.parts == 1 && op.grid.n_step_t == 0 && op.grid.n_jump_t == 0 && policy.beta[0] == 1 &&
         policy.beta[1] == 0 && policy.beta[2] == 0 && policy.alpha[0] == 0 && policy.alpha[1] == 0 &&
         policy.resume == 0 && policy.count_per_output == 0;
}

// Tells the compiler the same.
void make_plain(Control& op) {
  Policy& policy = op.policy;
  op.n_segments = op.parts = 1;
  op.grid.n_step_t = op.grid.n_jump_t = 0;
  policy.beta[0] = 1;
  policy.beta[1] = policy.beta[2] = policy.alpha[0] = policy.alpha[1] = 0;
  policy.resume = policy.count_per_output = 0;
}

// The flags of all samples in [begin, end). One function without calls, and with constants of its own, which no store
// can change: a sample's words and all constants stay in registers.
template <class T, bool kPlain>
PYODE_FLATTEN int64_t judge_range(const Control& given, int64_t begin, int64_t end) {
  Control op = given;
  if (kPlain) make_plain(op);
  int64_t flags = 0;
  counts_t<Side> all = {};
  for (int64_t b = begin; b < end; b += kBlock) {
    const int64_t stop = b + kBlock < end ? b + kBlock : end;
    double errors[kBlock], factors[kBlock];
    for_samples(b, stop, [&](auto kind, int64_t i) {
      using R = decltype(kind);
      const R error = norm_of<R>(op, op.means, i), factor = fitting_factor(op.policy, error);
      memcpy(&errors[i - b], &error, sizeof error);
      memcpy(&factors[i - b], &factor, sizeof factor);
    });
    for_samples(b, stop, [&](auto kind, int64_t i) {
      decltype(kind) error, factor;
      memcpy(&error, &errors[i - b], sizeof error);
      memcpy(&factor, &factors[i - b], sizeof factor);
      Samples<decltype(kind)> s;
      const auto some = control_step<kPlain ? kKeptPlainly : 0>(op, i, error, factor, s);
      if constexpr (is_vector<decltype(kind)>)
        all |= some;
      else
        flags |= some;
    });
    int last_stage = -1;  // the stage at the step's end, whose time others share
    for (int c = 0; c < op.n_times; ++c) {
      if (op.c[c] == 1 && last_stage >= 0) {
        T* const times = static_cast<T*>(op.stage_times) + b;
        std::memcpy(times + c * op.state.samples, times + last_stage * op.state.samples, sizeof(T) * (stop - b));
        continue;
      }
      if (op.c[c] == 1) last_stage = c;
      for_samples(b, stop, [&](auto kind, int64_t i) {
        write_stage_time<T>(op, c, load_sample<decltype(kind)>(op.state, i), i);
      });
    }
  }
  for (int l = 0; l < lanes<Side>; ++l) flags |= math::lane(all, l);
  return flags;
}

}  // namespace

void control(const Layout& layout, const Control& op) {
  with_scalar(op.time_scalar, [&](auto kind) {
    using T = decltype(kind);
    const int64_t samples = op.state.samples, parts = (samples + kTogether - 1) / kTogether;
    const bool plain = is_plain(op);
    std::atomic<int64_t> flags{0};
    parallel_for(parts, 4 * samples < worth_sharing() ? 1 : layout.threads, [&](int64_t part) {
      const int64_t begin = part * kTogether, end = begin + kTogether < samples ? begin + kTogether : samples;
      int64_t some = 0;
      if (op.phase == Phase::judge)
        some = plain ? judge_range<T, true>(op, begin, end) : judge_range<T, false>(op, begin, end);
      else
        for (int64_t b = begin; b < end; ++b) some |= control_first_step<T>(op, b);
      flags.fetch_or(some, std::memory_order_relaxed);
    });
    op.flags[op.turn] = flags;
    op.flags[1 - op.turn] = 0;
  });
}

}  // namespace pyode::cpu::PYODE_LEVEL
