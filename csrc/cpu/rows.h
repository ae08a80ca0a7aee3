// The loop that stage sums and dense output share: out = y + dt sum_j w_j k_j over a range of numbers.
// Compiled once for each SIMD level, as all that includes it.
#pragma once

#include <cstring>
#include <type_traits>

#include "../core/step.h"
#include "../core/vector.h"
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

constexpr int64_t kChunk = 8192;    // numbers a thread takes at a time
constexpr int64_t kSmallRow = 129;  // below so many numbers a sample, a loop runs over many samples
constexpr int64_t kBlock = 512;     // numbers in such a loop

// As many doubles as a register holds, or one.
#if defined(PYODE_VECTORS)
using Side = Vector<double, kRegister>;
#else
using Side = double;
#endif

inline int threads_for(const Layout& layout) {
  return layout.samples * layout.size < cpu::worth_sharing(layout.func_is_long) ? 1 : layout.threads;
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

/// Calls body with n as a constant if it is from 1 to kMost; whether it has.
template <int kMost, int N = 1, class Body>
bool with_constant(int64_t n, Body body) {
  if (n == N) {
    body(std::integral_constant<int, N>{});
    return true;
  }
  if constexpr (N < kMost) return with_constant<kMost, N + 1>(n, body);
  return false;
}
constexpr int kFewTerms = 7;  // tableaus of up to so many stages get a loop of their own for every number of terms

template <int N, class T>
void accumulate(const Terms<T>& terms, int64_t begin, int64_t end, arithmetic_t<T>* sums) {
  const T* k[N];
  for (int j = 0; j < N; ++j) k[j] = terms.k[j] + begin;
  PYODE_INDEPENDENT
  for (int64_t i = 0; i < end - begin; ++i) sums[i] = weighted_sum<N>(N, terms.w, [&](int j) { return load(k[j][i]); });
}

/// sums[i - begin] = sum_j w_j k_j[i], for any number of terms and at most kBlock numbers, in table order.
template <class T>
void accumulate_any(int n, const Terms<T>& terms, int64_t begin, int64_t end, arithmetic_t<T>* sums) {
  using A = arithmetic_t<T>;
  if (with_constant<kFewTerms>(n, [&](auto count) { accumulate<decltype(count)::value>(terms, begin, end, sums); }))
    return;
  accumulate<kFewTerms>(terms, begin, end, sums);
  for (int j = kFewTerms; j < n; ++j) {
    const T* const k = terms.k[j] + begin;
    const A w = terms.w[j];
    PYODE_INDEPENDENT
    for (int64_t i = 0; i < end - begin; ++i) sums[i] = fused_multiply_add(w, load(k[i]), sums[i]);
  }
}

// Long sums go block by block.
template <class T, class Step>
void sum_terms_any(int n, const Terms<T>& terms, int64_t begin, int64_t end, Step dt) {
  using A = arithmetic_t<T>;
  if (with_constant<kFewTerms>(n, [&](auto count) { sum_terms<decltype(count)::value>(terms, begin, end, dt); }))
    return;
  A sums[kBlock];
  for (int64_t from = begin; from < end; from += kBlock) {
    const int64_t to = from + kBlock < end ? from + kBlock : end;
    accumulate_any(n, terms, from, to, sums);
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

/// Calls body(b, begin, end) for chunks of samples, shared among threads.
template <class Body>
void for_each_chunk(const Layout& layout, Body body) {
  const int64_t total = layout.samples * layout.size;
  cpu::parallel_for((total + kChunk - 1) / kChunk, threads_for(layout), [&](int64_t chunk) {
    const int64_t begin = chunk * kChunk, end = begin + kChunk < total ? begin + kChunk : total;
    for_each_row(begin, end, layout.size, body);
  });
}

/// Whether a loop is to run over the numbers of many samples.
inline bool rows_are_small(const Layout& layout) {
  return layout.samples > 1 && layout.size > 0 && layout.size < kSmallRow;
}

template <int64_t kSize, class A, class Word>
void repeat(const Word* words, int64_t rows, A* out) {
  for (int64_t b = 0; b < rows; ++b)
    for (int64_t i = 0; i < kSize; ++i) out[b * kSize + i] = static_cast<A>(words[b]);
}

/// Every word `size` times.
template <class A, class Word>
void repeat_any(int64_t size, const Word* words, int64_t rows, A* out) {
  switch (size) {
    case 1:
      return repeat<1>(words, rows, out);
    case 2:
      return repeat<2>(words, rows, out);
    case 3:
      return repeat<3>(words, rows, out);
    case 4:
      return repeat<4>(words, rows, out);
    case 6:
      return repeat<6>(words, rows, out);
    case 8:
      return repeat<8>(words, rows, out);
    default:
      for (int64_t b = 0; b < rows; ++b)
        for (int64_t i = 0; i < size; ++i) out[b * size + i] = static_cast<A>(words[b]);
  }
}

/// Calls body(first, begin, end, each) for blocks of small rows, from row `first` on, numbers [begin, end): each[i] is
/// the sample's word for number begin + i. A block has at most kBlock numbers.
template <class A, class Word, class Body>
void for_small_rows(const Layout& layout, const Word* words, Body body) {
  const int64_t size = layout.size, most = kBlock / size;
  const int64_t rows = most >= 16 ? most / 16 * 16 : most;  // so that vectors fill a block
  const int64_t together = kChunk / size / rows * rows;
  cpu::parallel_for((layout.samples + together - 1) / together, threads_for(layout), [&](int64_t task) {
    const int64_t last = (task + 1) * together < layout.samples ? (task + 1) * together : layout.samples;
    A each[kBlock];
    for (int64_t first = task * together; first < last; first += rows) {
      const int64_t n = first + rows < last ? rows : last - first;
      repeat_any(size, words + first, n, each);
      body(first, first * size, (first + n) * size, each);
    }
  });
}

/// All samples, each with its own step dt[b].
template <class T>
void sum_rows(const Layout& layout, int n, const Terms<T>& terms, const double* dt) {
  using A = arithmetic_t<T>;
  if (n > 0 && rows_are_small(layout)) {
    for_small_rows<A>(layout, dt, [&](int64_t, int64_t begin, int64_t end, const A* steps) {
      sum_terms_any<T>(n, terms, begin, end, [&](int64_t i) { return steps[i - begin]; });
    });
    return;
  }
  for_each_chunk(layout,
                 [&](int64_t b, int64_t begin, int64_t end) { sum_row(n, terms, begin, end, n == 0 ? 0 : dt[b]); });
}

}  // namespace PYODE_LEVEL
}  // namespace pyode
