// Rows with times and step sizes of their own, one in each lane of a block.
#pragma once

#include "blocks.h"

namespace pyode {
inline namespace PYODE_LEVEL {
namespace compiled {

/// Rows side by side, as the adaptive loop with a controller for each and its undoing need them.
template <class F>
struct SideBySide {
  using T = typename F::T;
  using V = typename F::V;
  using R = Wide<V>;
  using Counts = counts_t<R>;
  using Flags = flags_t<R>;
  static constexpr int W = lanes<V>, D = F::size, H = halves<V>, N = W / H;  // N samples in each of H vectors

  /// A number for each lane.
  struct Numbers {
    R parts[H];
    double operator[](int l) const { return parts[l / N][l % N]; }
    void set(int l, double x) { parts[l / N][l % N] = x; }
  };
  struct Integers {
    Counts parts[H];
    int64_t operator[](int l) const { return parts[l / N][l % N]; }
    void set(int l, int64_t x) { parts[l / N][l % N] = x; }
  };

  /// The step states of all lanes.
  struct Steps {
    Samples<R> parts[H];

    static constexpr int words = kWords;
    Sample get(int l) const {
      double numbers[kWords][N];
      memcpy(numbers, &parts[l / N], sizeof numbers);
      double words[kWords];
      for (int i = 0; i < kWords; ++i) memcpy(&words[i], &numbers[i][l % N], 8);
      Sample s;
      memcpy(&s, words, sizeof s);
      return s;
    }
    void set(int l, const Sample& s) {
      char* const to = reinterpret_cast<char*>(&parts[l / N]) + 8 * (l % N);
      for (int i = 0; i < kWords; ++i) memcpy(to + i * sizeof(R), reinterpret_cast<const char*>(&s) + 8 * i, 8);
    }
    /// Takes over the lanes for which `which` holds.
    void take(const Integers& which, const Steps& other) {
      for (int h = 0; h < H; ++h) {
        Counts mine[kWords], theirs[kWords];
        memcpy(mine, &parts[h], sizeof mine);
        memcpy(theirs, &other.parts[h], sizeof theirs);
        for (int i = 0; i < kWords; ++i) mine[i] = which.parts[h] != 0 ? theirs[i] : mine[i];
        memcpy(&parts[h], mine, sizeof mine);
      }
    }
  };

  /// body(h) for each part, as a mask of vectors.
  template <class Body>
  static mask_t<V> mask(Body body) {
    Counts parts[H];
    for (int h = 0; h < H; ++h) parts[h] = body(h);
    return narrow<mask_t<V>>(parts);
  }
  /// body(h) for each part, rounded to the state's numbers.
  template <class Body>
  static V numbers(Body body) {
    R parts[H];
    for (int h = 0; h < H; ++h) parts[h] = body(h);
    return narrow<V>(parts);
  }

  /// When the j-th evaluation of a step is.
  static V stage_times(const Steps& steps, double c) {
    Half<V> parts[H];
    for (int h = 0; h < H; ++h) parts[h] = stage_time<Half<V>>(steps.parts[h], c);
    V times;
    memcpy(&times, parts, sizeof times);
    return times;
  }

  /// A row of D numbers to lane l.
  static void set_row(V* to, int l, const T* row) {
    for (int d = 0; d < D; ++d) to[d][l] = row[d];
  }
  static void get_row(const V* from, int l, T* row) {
    for (int d = 0; d < D; ++d) row[d] = from[d][l];
  }
};

/// Whether dense output has a weight for evaluation j.
template <class M>
constexpr bool is_interpolated(int j) {
  for (int p = 0; p < M::degree; ++p)
    if (M::interpolant[j][p] != 0) return true;
  return false;
}

/// The weights of an interpolant at a position x[h] for each lane; body(j, w) for those j whose weight is not 0
/// everywhere. Those that are 0 at some positions only are the second body's: 0 times inf would be nan.
template <class M, class F, class Body, class Careful>
PYODE_HD void for_each_output_weight(const typename SideBySide<F>::Numbers& x, Body body, Careful careful) {
  using R = typename SideBySide<F>::R;
  for (int j = 0; j < M::evaluations; ++j) {
    const bool at_end = M::end[j] != 0, between = is_interpolated<M>(j);
    if (!at_end && !between) continue;
    const auto w = SideBySide<F>::numbers([&](int h) {
      const R at = x.parts[h];
      R weight{};
      for (int p = M::degree - 1; p >= 0; --p) weight = fused_multiply_add(weight, at, spread<R>(M::interpolant[j][p]));
      return at == 1 ? spread<R>(M::end[j]) : weight * at;
    });
    if (at_end && between)
      body(j, w);
    else
      careful(j, w);
  }
}

/// The slopes of these weights; body(j, w) for those j that have any.
template <class M, class F, class Body>
PYODE_HD void for_each_output_slope(const typename SideBySide<F>::Numbers& x, Body body) {
  using R = typename SideBySide<F>::R;
  for (int j = 0; j < M::evaluations; ++j) {
    if (!is_interpolated<M>(j)) continue;
    body(j, SideBySide<F>::numbers([&](int h) {
           R slope{};
           for (int p = M::degree - 1; p >= 0; --p)
             slope = fused_multiply_add(slope, x.parts[h], spread<R>((p + 1) * M::interpolant[j][p]));
           return slope;
         }));
  }
}

}  // namespace compiled
}  // namespace PYODE_LEVEL
}  // namespace pyode
