// The continuous adjoint of compiled dynamics: (y, a) as one state, and beside it the integrals of a df/dp, which
// nothing in the solve reads (pyode/gradients/backsolve.py, pyode/stepping/quadrature.py).
#pragma once

#include "reversal.h"

namespace pyode {
inline namespace PYODE_LEVEL {
namespace compiled {

/// d/dt of (y, a), where a' = -a df/dy: G is the emitted vector-Jacobian product.
template <class G>
struct Augmented {
  using T = typename G::T;
  using V = typename G::V;
  using Fixed = typename G::Fixed;
  using Timed = typename G::Timed;
  using Kept = typename G::Sums;  // what a df/dp is takes off them
  static constexpr bool has_way_back = false;
  static constexpr int half = G::size, size = 2 * half, n_segments = 2 * G::n_segments;
  static constexpr int64_t operations = G::operations;

  struct Segments {
    constexpr int operator[](int s) const {
      return s < G::n_segments ? G::segments[s] : half + G::segments[s - G::n_segments];
    }
  };
  static constexpr Segments segments{};

  static void prepare(const void* const* inputs, Fixed& fixed) { G::prepare(inputs, fixed); }
  static void at(T t, const void* const* inputs, const Fixed& fixed, Timed& timed) { G::at(t, inputs, fixed, timed); }
  /// Time is T, or V where every row has a time of its own.
  template <class Time>
  static void rows(Time t, const V* z, V* k, const void* const* inputs, const Fixed& fixed, const Timed& timed,
                   Kept& sums) {
    V g[half];
    typename G::Kept kept;
    for (int d = 0; d < half; ++d) g[d] = -z[half + d];
    G::rows(t, z, k, inputs, fixed, timed, kept);
    G::back(t, z, g, k + half, inputs, fixed, timed, kept, sums);
  }
};

/// Integrals along an adaptive solve of (y, a): their values, their share in its norm, and the jumps of the adjoint.
template <class G, class M>
class AdjointIntegrals {
  using T = typename G::T;
  using V = typename G::V;
  using A = Augmented<G>;
  using Sums = typename G::Sums;
  static constexpr int S = M::evaluations;
  // Of a part: the sums of each evaluation, then those weighted for the step's end, and for its error.
  static constexpr int kEnd = S, kError = S + 1, kSlots = S + 2;
  static constexpr int64_t kNumbers = sizeof(Sums) / sizeof(T);
  static constexpr int64_t size_of_all() {
    int64_t n = 0;
    for (int i = 0; i < G::n_gradients; ++i) n += G::gradient_sizes[i];
    return n;
  }
  static constexpr int64_t P = size_of_all();

 public:
  static constexpr int64_t most_parts = kPartsOfSums<G>;

  static int64_t workspace(int64_t parts) {
    return parts * kSlots * static_cast<int64_t>(sizeof(Sums)) + 3 * P * static_cast<int64_t>(sizeof(T)) + 64;
  }

  AdjointIntegrals(CompiledSolve& s, int64_t n_parts, const typename G::Fixed& fixed, void* memory)
      : solve(s), parts(n_parts), fixed_(fixed) {
    sums_ = static_cast<Sums*>(memory);
    value_ = reinterpret_cast<T*>(sums_ + parts * kSlots);
    end_ = value_ + P;
    error_ = end_ + P;
    for (int j = 0; j < S; ++j) slot_[j] = j;
    pending_ = solve.n_arrivals - 2;
  }

  /// Begins at the last output; before it, finds what moving the outputs along the solution does.
  template <class Rows>
  void start(Rows& rows) {
    for (int64_t p = 0; p < P; ++p) value_[p] = 0;
    if constexpr (G::has_time) {
      for (int64_t i = 1; i < solve.n_arrivals; ++i) solve.output_time_gradient[i] = effect_of_moving(rows, i);
      move_time(solve.n_arrivals - 1);
    }
  }

  /// Makes ready for evaluation j.
  void clear(int64_t part, int j) { memset(static_cast<void*>(&sums(part, j)), 0, sizeof(Sums)); }

  template <class Record>
  void rows(int64_t part, int j, T t, const V* z, V* k, const typename G::Timed& timed, Record*) {
    A::rows(t, z, k, solve.inputs, fixed_, timed, sums(part, j));
  }

  /// Adds up a part's evaluations, when all of a step have been made.
  void weigh(int64_t part) {
    weigh(part, kEnd, M::end);
    weigh(part, kError, M::error);
  }

  /// The largest mean square of the integrals' scaled errors in the step just made; of a first step, their values',
  /// their slopes' or the slopes' change over it.
  double of_step(T dt) {
    total(kEnd, end_);
    total(kError, error_);
    for (int64_t p = 0; p < P; ++p) {
      end_[p] = advance_state(value_[p], dt, end_[p]);
      error_[p] = dt * error_[p];
    }
    return mean_square(end_);
  }
  double of_values() {
    memcpy(error_, value_, sizeof(T) * P);
    return mean_square(value_);
  }
  double of_slopes() {
    total(slot_[0], error_);
    return mean_square(value_);
  }
  double of_change(T dt) {
    total(slot_[0], end_);
    total(slot_[1], error_);
    for (int64_t p = 0; p < P; ++p) error_[p] = dt * (error_[p] - end_[p]);
    return mean_square(value_);
  }

  /// The last evaluation of an accepted step is the first of the next.
  void accept() {
    T* const value = value_;
    value_ = end_;
    end_ = value;
    const int last = slot_[S - 1];
    slot_[S - 1] = slot_[0];
    slot_[0] = last;
  }

  /// Which of the outputs, whose gradients arrive, lies at the time to which the solve has come; -1: none.
  int64_t arrival(double t) {
    if (pending_ <= 0 || solve.arrival_times[pending_] != t) return -1;
    if constexpr (G::has_time) move_time(pending_);
    return pending_--;
  }

  /// Behind an output: y from the forward solve, a with the gradient that arrives.
  template <class Rows>
  void arrive(const Rows& rows, int64_t i, int64_t b, V* z) const {
    if (i < 0) return;
    const int64_t n = solve.rows * G::size;
    V g[G::size];
    rows.load(static_cast<const T*>(solve.arriving_states) + i * n, b, z, G::n_segments);
    rows.load(static_cast<const T*>(solve.gradient) + i * n, b, g, G::n_segments);
    rows.template blank<G::size>(b, g);
    for (int d = 0; d < G::size; ++d) z[G::size + d] += g[d];
  }

  /// Rows that only fill the last block have an adjoint of 0.
  template <class Rows>
  void begin(const Rows& rows, int64_t b, V* z) const {
    rows.template blank<G::size>(b, z + G::size);
  }

  void finish() const {
    const T* from = value_;
    for (int i = 0; i < G::n_gradients; ++i) {
      memcpy(solve.gradients[i], from, sizeof(T) * static_cast<size_t>(G::gradient_sizes[i]));
      from += G::gradient_sizes[i];
    }
  }

 private:
  CompiledSolve& solve;
  const int64_t parts;
  const typename G::Fixed& fixed_;
  Sums* sums_;                // [parts, kSlots]
  T *value_, *end_, *error_;  // [P]: at the step's ends, and of the step
  int slot_[S];               // where an evaluation's sums are
  int64_t pending_;           // the next output whose gradient arrives
  typename G::Totals totals_;

  /// The integral of time, behind all others.
  void move_time(int64_t i) { value_[P - 1] -= static_cast<T>(solve.output_time_gradient[i]); }

  /// The inner product of f with the gradient that arrives at output i, over all rows.
  template <class Rows>
  double effect_of_moving(Rows& rows, int64_t i) {
    const T t = static_cast<T>(solve.arrival_times[i]);
    const int64_t n = solve.rows * G::size * i;
    double of_parts[most_parts];
    typename G::Timed timed;
    G::at(t, solve.inputs, fixed_, timed);
    solve.evaluations += 1;
    rows.for_each_part(G::operations, [&](int64_t part) {
      V sum{};
      rows.for_each_block(part, [&](int64_t b) {
        V y[G::size], g[G::size], k[G::size];
        typename G::Kept kept;
        rows.load(static_cast<const T*>(solve.arriving_states) + n, b, y, G::n_segments);
        rows.load(static_cast<const T*>(solve.gradient) + n, b, g, G::n_segments);
        rows.template blank<G::size>(b, g);
        G::rows(t, y, k, solve.inputs, fixed_, timed, kept);
        sum += effect_of<G::size>(g, k);
      });
      of_parts[part] = over_lanes(sum);
    });
    double total = 0;
    for (int64_t part = 0; part < parts; ++part) total += of_parts[part];
    return total;
  }

  Sums& sums(int64_t part, int j) { return sums_[part * kSlots + slot_[j]]; }

  void weigh(int64_t part, int slot, const double (&weights)[S]) {
    T* const to = reinterpret_cast<T*>(&sums_[part * kSlots + slot]);
    memset(static_cast<void*>(to), 0, sizeof(Sums));
    for (int j = 0; j < S; ++j) {
      if (weights[j] == 0) continue;
      const T w = static_cast<T>(weights[j]);
      const T* const from = reinterpret_cast<const T*>(&sums(part, j));
      for (int64_t i = 0; i < kNumbers; ++i) to[i] = fused_multiply_add(w, from[i], to[i]);
    }
  }

  /// The gradients that sums of all parts stand for.
  void total(int slot, T* to) {
    if constexpr (P > 0) {
      void* gradients[G::n_gradients];
      for (int i = 0; i < G::n_gradients; ++i) {
        gradients[i] = to;
        to += G::gradient_sizes[i];
      }
      G::collect(sums_ + slot, parts, totals_, kSlots);
      G::finish(solve.inputs, fixed_, totals_, gradients);
    }
  }

  /// Of error_, relative to what is tolerated between value_ and another.
  double mean_square(const T* other) const {
    double largest = 0;
    int64_t p = 0;
    for (int i = 0; i < G::n_gradients; ++i) {
      const int64_t end = p + G::gradient_sizes[i];
      if (i < solve.first_measured) p = end;
      double sum = 0;
      for (; p < end; ++p) {
        const double ratio = scaled_error(std::abs(error_[p]), std::abs(value_[p]), std::abs(other[p]),
                                          static_cast<T>(solve.integral_rtol), static_cast<T>(solve.integral_atol));
        sum += ratio * ratio;
      }
      if (G::gradient_sizes[i] > 0) largest = larger(sum / G::gradient_sizes[i], largest);
    }
    return largest;
  }
};

}  // namespace compiled
}  // namespace PYODE_LEVEL
}  // namespace pyode
