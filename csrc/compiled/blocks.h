// Rows in blocks: as many as a SIMD register has lanes, a vector for each number of a row (structure of arrays).
#pragma once

#include "../core/controller.h"
#include "../core/vector_math.h"
// Behind the vectors, whose functions it is to find.
#include "../core/step.h"

namespace pyode {

/// An accepted step, as its undoing needs it.
struct TapeStep {
  double t0, dt, t1;
  double first_time;  // that f saw in the step's first evaluation
  int64_t output_begin, output_end;
  int64_t chained;  // whether that evaluation was the last of the step before
};

/// A solve, as Python hands it over; pyode/compiled/native.py has the same struct.
struct CompiledSolve {
  const void* y0;   // packed as pyode/state.py does: the parts of a tuple one behind the other, each [rows, ...]
  void* out;        // [T] such states
  void* workspace;  // for `workspace` bytes
  const void* const* inputs;  // the tensors that f has closed over, contiguous
  int64_t rows;
  Grid grid;
  Policy policy;
  double rtol, atol;                    // used where the pointers are null
  const double *rtol_each, *atol_each;  // for every number of a state
  double first_step;                    // nan: to be found
  const double* ends;                   // fixed grid: the n_ends times of the steps' ends
  int64_t n_ends;
  const void* stage_times;  // fixed grid: [n_ends - 1, stages], as f sees them
  int64_t threads;
  void (*run_parallel)(int64_t n, int threads, void (*body)(int64_t, void*), void* context);
  int (*interrupted)();  // asked now and then, by the calling thread; not 0: stop
  // A solve whose gradient is wanted notes its steps; then it is undone.
  void* tape;        // [capacity, blocks, D] vectors: the states at their starts
  TapeStep* steps;   // [capacity]
  int64_t capacity;  // a solve of more steps goes on without noting them
  int64_t n_steps;
  const void* gradient;    // [T] states: what arrives at the outputs
  void* y0_gradient;       // a state
  void* const* gradients;  // of the inputs for which they are wanted
  // What comes back.
  Sample sample;
  int64_t evaluations;
  int64_t finite_start;  // after a failure before the first step: whether y0 and f(t0, y0) are finite
};

constexpr int64_t kInterrupted = -1;  // a status beside those of the controller

inline namespace PYODE_LEVEL {
namespace compiled {

using namespace math;

/// The rows of a solve, cut into blocks and these into at most kMost parts, among which threads share. F is the emitted
/// dynamics.
template <class F, int64_t kMost = 64>
struct Blocks {
  using T = typename F::T;
  using V = typename F::V;
  static constexpr int W = lanes<V>, D = F::size;
  static constexpr int64_t kMaxParts = kMost;

  CompiledSolve& solve;
  const int64_t blocks = (solve.rows + W - 1) / W;
  const int64_t blocks_a_part = (blocks + kMaxParts - 1) / kMaxParts;
  const int64_t parts = (blocks + blocks_a_part - 1) / blocks_a_part;

  explicit Blocks(CompiledSolve& s) : solve(s) {}

  /// Calls body(part) for all parts, by several threads if a call does enough operations on every row.
  template <class Body>
  void for_each_part(int64_t operations, Body body) {
    constexpr int64_t worth_sharing = 1 << 20;  // operations: below, another thread wakes too late
    if (solve.threads > 1 && operations * solve.rows > worth_sharing)
      solve.run_parallel(
          parts, static_cast<int>(solve.threads),
          [](int64_t part, void* context) { (*static_cast<Body*>(context))(part); }, &body);
    else
      for (int64_t part = 0; part < parts; ++part) body(part);
  }

  /// Calls body(block) for the blocks of a part.
  template <class Body>
  void for_each_block(int64_t part, Body body) {
    const int64_t end = smaller_of((part + 1) * blocks_a_part, blocks);
    for (int64_t block = part * blocks_a_part; block < end; ++block) body(block);
  }

  /// How many rows of a block are rows of the state; those behind repeat the last one.
  int valid(int64_t block) const { return static_cast<int>(smaller_of(W, solve.rows - block * W)); }

  /// Reads a block from a packed state of numbers of any type.
  template <class From>
  void load(const From* packed, int64_t block, V* to) const {
    const int last = valid(block) - 1;
    for (int s = 0; s < F::n_segments; ++s) {
      const int begin = F::segments[s], width = F::segments[s + 1] - begin;
      const From* const from = packed + solve.rows * begin + block * W * width;
      for (int d = 0; d < width; ++d) {
        T row[W];
        for (int l = 0; l < W; ++l) row[l] = static_cast<T>(from[smaller_of(l, last) * width + d]);
        memcpy(&to[begin + d], row, sizeof row);
      }
    }
  }

  /// Writes a block to a packed state.
  void store(const V* from, int64_t block, T* packed) const {
    const int n = valid(block);
    T numbers[D][W];
    memcpy(numbers, from, sizeof numbers);
    for (int s = 0; s < F::n_segments; ++s) {
      const int begin = F::segments[s], width = F::segments[s + 1] - begin;
      T* const to = packed + solve.rows * begin + block * W * width;
      if (n == W) {
        for (int l = 0; l < W; ++l)
          for (int d = 0; d < width; ++d) to[l * width + d] = numbers[begin + d][l];
      } else {
        for (int l = 0; l < n; ++l)
          for (int d = 0; d < width; ++d) to[l * width + d] = numbers[begin + d][l];
      }
    }
  }

  static int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
};

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
        const Wide wide = __builtin_convertvector(halves[i], Wide);
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
