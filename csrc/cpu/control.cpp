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

#if defined(__AVX512F__)
constexpr int kRegister = 64;  // bytes
#elif defined(__AVX__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif

// The flags of all samples in [begin, end). One function without calls, and with constants of its own, which no store
// can change: a sample's words and all constants stay in registers.
template <class T>
PYODE_FLATTEN int64_t judge_range(const Control& given, int64_t begin, int64_t end) {
  const Control op = given;
  int64_t b = begin, flags = 0;
#if defined(PYODE_VECTORS)
  using R = Vector<double, kRegister>;
  counts_t<R> all = {};
  for (; b + lanes<R> <= end; b += lanes<R>) all |= control_step<T, R>(op, b);
  for (int i = 0; i < lanes<R>; ++i) flags |= all[i];
#endif
  for (; b < end; ++b) flags |= control_step<T, double>(op, b);
  return flags;
}

}  // namespace

void control(const Layout& layout, const Control& op) {
  with_scalar(op.time_scalar, [&](auto kind) {
    using T = decltype(kind);
    const int64_t samples = op.state.samples, parts = (samples + kTogether - 1) / kTogether;
    std::atomic<int64_t> flags{0};
    parallel_for(parts, samples < kWorthSharing / 4 ? 1 : layout.threads, [&](int64_t part) {
      const int64_t begin = part * kTogether, end = begin + kTogether < samples ? begin + kTogether : samples;
      int64_t some = 0;
      if (op.phase == Phase::judge)
        some = judge_range<T>(op, begin, end);
      else
        for (int64_t b = begin; b < end; ++b) some |= control_first_step<T>(op, b);
      flags.fetch_or(some, std::memory_order_relaxed);
    });
    op.flags[op.turn] = flags;
    op.flags[1 - op.turn] = 0;
  });
}

}  // namespace pyode::cpu::PYODE_LEVEL
