// The loop that stage sums and dense output share: out = y + dt sum_j w_j k_j over a range of numbers.
// Compiled once for each SIMD level, as all that includes it.
#pragma once

#include <cstring>
#include <type_traits>

#include "../core/step.h"
#include "../ops.h"
#include "parallel.h"

#if defined(__clang__)
#define PYODE_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define PYODE_INDEPENDENT _Pragma("GCC ivdep")
#elif defined(_MSC_VER)
#define PYODE_INDEPENDENT __pragma(loop(ivdep))
#else
#define PYODE_INDEPENDENT
#endif

namespace pyode {
inline namespace PYODE_LEVEL {

constexpr int64_t kChunk = 16384;           // numbers a thread takes at a time
constexpr int64_t kWorthSharing = 1 << 16;  // numbers; below, waking another thread costs more than it saves
constexpr int64_t kSmallRow = 64;           // below so many numbers a sample, a loop runs over many samples
constexpr int64_t kBlock = 256;             // numbers in such a loop

inline int threads_for(const Layout& layout) {
  return layout.samples * layout.size < kWorthSharing ? 1 : layout.threads;
}

/// What is summed: pointers to the first number of each array.
template <class T>
struct Terms {
  using A = arithmetic_t<T>;
  T* out;
  const T* y;
  const T* k[kMaxStages];
  A w[kMaxStages];
};

// Step(i) is the step size for number i; a step of 0 leaves y as it is.
template <int N, class T, class Step>
void sum_terms(const Terms<T>& terms, int64_t begin, int64_t end, Step dt) {
  using A = arithmetic_t<T>;
  T* const out = terms.out;
  const T* const y = terms.y;
  const T* k[N];
  A w[N];
  for (int j = 0; j < N; ++j) {
    k[j] = terms.k[j];
    w[j] = terms.w[j];
  }
  PYODE_INDEPENDENT
  for (int64_t i = begin; i < end; ++i) {
    const A sum = weighted_sum<N>(N, w, [&](int j) { return load(k[j][i]); });
    const A step = dt(i), start = load(y[i]);
    const A moved = advance_state(start, step, sum);
    out[i] = store<T>(step == 0 ? start : moved);
  }
}

/// sums[i - begin] = sum_j w_j k_j[i], for any number of terms and at most kBlock numbers: term by term, in table
/// order.
template <class T>
void accumulate(int n, const Terms<T>& terms, int64_t begin, int64_t end, arithmetic_t<T>* sums) {
  using A = arithmetic_t<T>;
  const auto add = [&](int j, auto first) {
    const T* const k = terms.k[j] + begin;
    const A w = terms.w[j];
    PYODE_INDEPENDENT
    for (int64_t i = 0; i < end - begin; ++i)
      sums[i] = first ? w * load(k[i]) : fused_multiply_add(w, load(k[i]), sums[i]);
  };
  add(0, std::true_type{});
  for (int j = 1; j < n; ++j) add(j, std::false_type{});
}

// Tableaus of up to seven stages get a loop of their own for every number of terms; longer sums go block by block.
template <class T, class Step>
void sum_terms_any(int n, const Terms<T>& terms, int64_t begin, int64_t end, Step dt) {
  using A = arithmetic_t<T>;
  switch (n) {
    case 1:
      return sum_terms<1>(terms, begin, end, dt);
    case 2:
      return sum_terms<2>(terms, begin, end, dt);
    case 3:
      return sum_terms<3>(terms, begin, end, dt);
    case 4:
      return sum_terms<4>(terms, begin, end, dt);
    case 5:
      return sum_terms<5>(terms, begin, end, dt);
    case 6:
      return sum_terms<6>(terms, begin, end, dt);
    case 7:
      return sum_terms<7>(terms, begin, end, dt);
    default:
      break;
  }
  A sums[kBlock];
  for (int64_t from = begin; from < end; from += kBlock) {
    const int64_t to = from + kBlock < end ? from + kBlock : end;
    accumulate(n, terms, from, to, sums);
    PYODE_INDEPENDENT
    for (int64_t i = from; i < to; ++i) {
      const A step = dt(i), start = load(terms.y[i]);
      const A moved = advance_state(start, step, sums[i - from]);
      terms.out[i] = store<T>(step == 0 ? start : moved);
    }
  }
}

/// Numbers [begin, end) of one sample.
template <class T>
void sum_row(int n, const Terms<T>& terms, int64_t begin, int64_t end, double dt) {
  using A = arithmetic_t<T>;
  if (n == 0 || dt == 0) {
    std::memcpy(terms.out + begin, terms.y + begin, sizeof(T) * static_cast<size_t>(end - begin));
    return;
  }
  sum_terms_any<T>(n, terms, begin, end, [step = static_cast<A>(dt)](int64_t) { return step; });
}

/// Calls body(b, begin, end) for the part of every sample b that lies in numbers [begin, end).
template <class Body>
void for_each_row(int64_t begin, int64_t end, int64_t size, Body body) {
  for (int64_t b = begin / size; begin < end; ++b) {
    const int64_t stop = end < (b + 1) * size ? end : (b + 1) * size;
    body(b, begin, stop);
    begin = stop;
  }
}

/// The step size of the sample of every number in [begin, end).
template <class A>
void fill_steps(int64_t size, const double* dt, int64_t begin, int64_t end, A* steps) {
  for_each_row(begin, end, size, [&](int64_t b, int64_t i, int64_t stop) {
    const A step = static_cast<A>(dt[b]);
    for (; i < stop; ++i) steps[i - begin] = step;
  });
}

/// All samples, each with its own step dt[b].
template <class T>
void sum_rows(const Layout& layout, int n, const Terms<T>& terms, const double* dt) {
  using A = arithmetic_t<T>;
  const int64_t total = layout.samples * layout.size;
  cpu::parallel_for((total + kChunk - 1) / kChunk, threads_for(layout), [&](int64_t chunk) {
    const int64_t begin = chunk * kChunk, end = begin + kChunk < total ? begin + kChunk : total;
    if (layout.samples == 1 || layout.size >= kSmallRow || n == 0) {
      for_each_row(begin, end, layout.size,
                   [&](int64_t b, int64_t from, int64_t to) { sum_row(n, terms, from, to, n == 0 ? 0 : dt[b]); });
      return;
    }
    A steps[kBlock];
    for (int64_t from = begin; from < end; from += kBlock) {
      const int64_t to = from + kBlock < end ? from + kBlock : end;
      fill_steps(layout.size, dt, from, to, steps);
      sum_terms_any<T>(n, terms, from, to, [&](int64_t i) { return steps[i - from]; });
    }
  });
}

}  // namespace PYODE_LEVEL
}  // namespace pyode
