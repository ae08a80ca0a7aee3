// Rows in blocks: as many as a SIMD register has lanes, a vector for each number of a row (structure of arrays).
#pragma once

#include <atomic>
#include <new>

#include "../core/side_by_side.h"
// Behind the vectors, whose functions they are to find.
#include "../core/controller.h"
#include "../core/step.h"
#include "solve.h"

namespace pyode {
inline namespace PYODE_LEVEL {
namespace compiled {

using namespace math;

/// Where vectors may lie, from some place in memory on.
inline void* aligned(void* memory) {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
}

/// Bytes for a solver and what it wants beside; the stack might be too small for what it computes once a solve.
template <class Solver>
int64_t workspace(CompiledSolve& solve) {
  return static_cast<int64_t>(sizeof(Solver)) + 128 + Solver::workspace(solve);
}
template <class Solver>
void run(CompiledSolve& solve) {
  void* const memory = aligned(solve.workspace);
  Solver* const solver = new (memory) Solver(solve, aligned(static_cast<char*>(memory) + sizeof(Solver)));
  solver->run();
  solver->~Solver();
}

/// Whether Ctrl-C has been pressed: only the calling thread can find out, and tells the others.
struct Interruption {
  CompiledSolve& solve;
  const char* const caller = this_thread();
  std::atomic<bool> stop{false};

  static const char* this_thread() {
    static thread_local char mark;
    return &mark;
  }

  /// Nothing else is handed over with it, so no order is needed.
  bool stopped() const { return stop.load(std::memory_order_relaxed); }

  void look() {
    if (!stopped() && solve.interrupted()) stop.store(true, std::memory_order_relaxed);
  }

  /// Whether to stop; to be asked after so many operations, of which `spent` keeps the sum.
  bool after(int64_t operations, int64_t& spent) {
    constexpr int64_t patience = 100'000'000;  // some tenths of a second at most
    if ((spent += operations) > patience && this_thread() == caller) {
      spent = 0;
      look();
    }
    return stopped();
  }
};

/// Calls body(i) for all i below n, by several threads if each of them does enough operations on every row.
template <class Body>
void share(Interruption& interruption, int64_t n, int64_t operations, Body& body) {
  constexpr int64_t worth_sharing = 1 << 23;  // operations: below, some 80 us of work, another thread wakes too late
  const CompiledSolve& solve = interruption.solve;
  if (n == 1 || solve.threads == 1 || operations * solve.rows <= worth_sharing) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  struct Job {
    Interruption& interruption;
    Body& body;
  } job{interruption, body};
  solve.run_parallel(
      n, static_cast<int>(solve.threads), [](int64_t i, void* context) { static_cast<Job*>(context)->body(i); }, &job,
      [](void* context) { static_cast<Job*>(context)->interruption.look(); });
}

/// Writes vectors as rows of n numbers, one of each vector: structure of arrays to array of structures.
template <int n, class V, class T>
PYODE_HD void interleave(const V* from, T* to) {
  constexpr int W = lanes<V>;
#if defined(__GNUC__) && !defined(__clang__)
  if constexpr (is_vector<V> && n > 1 && n <= 8) {
    // Number i of the rows is lane i / n of vector i % n: put in place one vector after the other.
#pragma GCC unroll 8
    for (int q = 0; q < n; ++q) {
      V row = from[0];
#pragma GCC unroll 8
      for (int d = 1; d < n; ++d) {
        integer_t<V> places;
        for (int l = 0; l < W; ++l) {
          const int i = q * W + l;
          places[l] = i % n == d ? W + i / n : d == 1 && i % n == 0 ? i / n : l;
        }
        row = __builtin_shuffle(row, from[d], places);
      }
      memcpy(to + q * W, &row, sizeof row);
    }
    return;
  }
#endif
  T numbers[n][W];
  memcpy(numbers, from, sizeof numbers);
  for (int l = 0; l < W; ++l)
    for (int d = 0; d < n; ++d) to[l * n + d] = numbers[d][l];
}

/// What the evaluations of a step of a block of rows leave for its way back.
template <class F, class M>
struct Evaluations {
  typename F::V stages[M::evaluations][F::size];
  typename F::Kept kept[M::evaluations];
};

/// The rows of a solve, cut into blocks and these into at most kMost parts, among which threads share; a part is worth
/// its sums. F is the emitted dynamics.
template <class F, int64_t kMost = 64>
struct Blocks {
  using T = typename F::T;
  using V = typename F::V;
  static constexpr int W = lanes<V>, D = F::size;
  static constexpr int64_t kMaxParts = kMost;
  static constexpr int64_t kLeastBlocks = 1 + 2048 / (W * (F::operations + 8 * D));  // in a part

  CompiledSolve& solve;
  const int64_t blocks = (solve.rows + W - 1) / W;
  const int64_t blocks_a_part = larger((blocks + kMaxParts - 1) / kMaxParts, kLeastBlocks);
  const int64_t parts = (blocks + blocks_a_part - 1) / blocks_a_part;
  Interruption interruption{solve};

  explicit Blocks(CompiledSolve& s) : solve(s) {}

  /// Calls body(part) for all parts, by several threads if a call does enough operations on every row.
  template <class Body>
  void for_each_part(int64_t operations, Body body) {
    share(interruption, parts, operations, body);
  }

  /// Calls body(block) for the blocks of a part.
  template <class Body>
  void for_each_block(int64_t part, Body body) {
    const int64_t end = smaller_of((part + 1) * blocks_a_part, blocks);
    for (int64_t block = part * blocks_a_part; block < end; ++block) body(block);
  }

  /// Calls body(block, n) for the blocks of a part, n together where there are so many, else one by one.
  template <int n, class Body>
  void for_each_group(int64_t part, Body body) {
    const int64_t end = smaller_of((part + 1) * blocks_a_part, blocks);
    int64_t block = part * blocks_a_part;
    for (; block + n <= end; block += n) body(block, std::integral_constant<int, n>());
    if constexpr (n > 1)
      for (; block < end; ++block) body(block, std::integral_constant<int, 1>());
  }

  /// How many rows of a block are rows of the state; those behind repeat the last one.
  int valid(int64_t block) const { return static_cast<int>(smaller_of(W, solve.rows - block * W)); }

  /// A block's record of the n-th step on the tape, which begins with the state; null if there is no room.
  typename F::V* record(int64_t n, int64_t block) const {
    if (!F::has_way_back || solve.tape == nullptr || n >= solve.capacity) return nullptr;
    return reinterpret_cast<V*>(static_cast<char*>(solve.tape) + (n * blocks + block) * solve.record);
  }
  /// The same if it is to have all that was evaluated; else null.
  template <class M>
  Evaluations<F, M>* evaluations(int64_t n, int64_t block) const {
    constexpr auto size = static_cast<int64_t>(sizeof(Evaluations<F, M>));
    return solve.record == size ? reinterpret_cast<Evaluations<F, M>*>(record(n, block)) : nullptr;
  }

  /// Reads a block from a packed state of numbers of any type, or from one of its first segments only.
  template <class From>
  void load(const From* packed, int64_t block, V* to, int n_segments = F::n_segments) const {
    const int last = valid(block) - 1;
    for (int s = 0; s < n_segments; ++s) {
      const int begin = F::segments[s], width = F::segments[s + 1] - begin;
      const From* const from = packed + solve.rows * begin + block * W * width;
      for (int d = 0; d < width; ++d) {
        T row[W];
        for (int l = 0; l < W; ++l) row[l] = static_cast<T>(from[smaller_of(l, last) * width + d]);
        memcpy(&to[begin + d], row, sizeof row);
      }
    }
  }

  /// Puts 0 into the rows that only fill the last block.
  template <int n>
  void blank(int64_t block, V* x) const {
    if (valid(block) == W) return;
    for (int d = 0; d < n; ++d) {
      T numbers[W];
      memcpy(numbers, &x[d], sizeof numbers);
      for (int l = valid(block); l < W; ++l) numbers[l] = 0;
      memcpy(&x[d], numbers, sizeof numbers);
    }
  }

  /// Writes a block to a packed state.
  void store(const V* from, int64_t block, T* packed) const {
    const int n = valid(block);
    store_segment<0>(from, block * W, n, packed);
  }

  static int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

 private:
  /// Writes n rows from `row` on, of all segments from s on.
  template <int s>
  void store_segment(const V* from, int64_t row, int n, T* packed) const {
    constexpr int width = F::segments[s + 1] - F::segments[s];
    T* const to = packed + solve.rows * F::segments[s] + row * width;
    if constexpr (width > 0) {
      if (n == W)
        interleave<width>(from + F::segments[s], to);
      else
        for (int l = 0; l < n; ++l)
          for (int d = 0; d < width; ++d) to[l * width + d] = lane(from[F::segments[s] + d], l);
    }
    if constexpr (s + 1 < F::n_segments) store_segment<s + 1>(from, row, n, packed);
  }
};

/// A vector in float64 takes as many vectors of its size.
template <class V>
constexpr int halves = sizeof(number_t<V>) == 4 ? 2 : 1;
template <class V>
using Wide = Vector<double, sizeof(V)>;
template <class V>
using Half = Vector<number_t<V>, sizeof(V) / halves<V>>;

template <class V>
PYODE_HD void widen(V x, Wide<V>* to) {
  Half<V> parts[halves<V>];
  memcpy(parts, &x, sizeof x);
  for (int h = 0; h < halves<V>; ++h) to[h] = convert<Wide<V>>(parts[h]);
}
template <class V, class From>
PYODE_HD V narrow(const From* from) {
  using Part = Vector<number_t<V>, sizeof(V) / halves<V>>;
  Part parts[halves<V>];
  for (int h = 0; h < halves<V>; ++h) parts[h] = convert<Part>(from[h]);
  V x;
  memcpy(&x, parts, sizeof x);
  return x;
}

/// A sum of squares for every lane, in float64.
template <class V>
struct SquareSums {
  static constexpr int n = is_vector<V> && is_single<V> ? 2 : 1;
  static constexpr int W = lanes<V>;
  using Half = Vector<float, is_vector<V> ? sizeof(V) / 2 : 16>;
  using Wide = std::conditional_t<is_vector<V>, Vector<double, is_vector<V> ? sizeof(V) : 16>, double>;
  Wide sums[n] = {};

  PYODE_HD void add(V x) {
    if constexpr (n == 2) {
      Half halves[2];
      memcpy(halves, &x, sizeof x);
      for (int i = 0; i < 2; ++i) {
        const Wide wide = convert<Wide>(halves[i]);
        sums[i] += wide * wide;
      }
    } else {
      const Wide wide = convert<Wide>(x);
      sums[0] += wide * wide;
    }
  }

  PYODE_HD void add(const SquareSums& other) {
    for (int i = 0; i < n; ++i) sums[i] += other.sums[i];
  }

  PYODE_HD double total() const {
    double numbers[W];
    memcpy(numbers, sums, sizeof numbers);
    for (int half = W / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) numbers[l] += numbers[l + half];
    return numbers[0];
  }
};

/// The weights of a sum other than zero, in table order.
template <class T, int N>
struct Terms {
  int n = 0;
  T w[N] = {};
  int at[N] = {};

  constexpr void add(double weight, int j) {
    if (weight == 0) return;
    w[n] = static_cast<T>(weight);
    at[n++] = j;
  }
};
template <class T, int N>
constexpr Terms<T, N> terms_of(const double (&weights)[N], int n = N) {
  Terms<T, N> terms;
  for (int j = 0; j < n; ++j) terms.add(weights[j], j);
  return terms;
}

/// sum_j w_j k[at_j].
template <class V, class T, int N, class Read>
PYODE_HD V sum_terms(const Terms<T, N>& terms, Read k) {
  V w[N];
  for (int j = 0; j < N; ++j) w[j] = broadcast<V>(terms.w[j]);
  return weighted_sum<N>(terms.n, w, [&](int j) { return k(terms.at[j]); });
}

}  // namespace compiled
}  // namespace PYODE_LEVEL
}  // namespace pyode
