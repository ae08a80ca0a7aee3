#include "levels.h"
#include "rows.h"

namespace pyode::cpu::PYODE_LEVEL {
namespace {

constexpr int64_t kLanes = 16;       // running sums: the i-th number goes to lane i % 16, whatever the SIMD width
constexpr int64_t kMaxParts = 1024;  // of a long segment, each summed by one thread
constexpr int64_t kPart = 4096;      // numbers in a part, unless that makes too many

// Squared ratios of numbers [begin, end), at most kBlock, into `ratios`; for complex states one for each pair.
// step(i) is the step size for number begin + i.
template <class T, bool kComplex, class Step>
void square_ratios(const ErrorNorm& op, const Terms<T>& terms, Step step, int64_t begin, int64_t end, double* ratios) {
  const T* const y0 = terms.y + begin;
  const T* const y1 = static_cast<const T*>(op.y1) + (y0 - static_cast<const T*>(op.y0));
  using A = arithmetic_t<T>;
  A errors[kBlock];
  accumulate_any(op.terms, terms, begin, end, errors);
  const int64_t n = end - begin;
  const auto fill = [&](auto rtol, auto atol) {
    if constexpr (kComplex) {
      PYODE_INDEPENDENT
      for (int64_t i = 0; i < n; i += 2) {
        const auto modulus = [](A re, A im) { return std::sqrt(re * re + im * im); };
        const double r =
            scaled_error(modulus(step(i) * errors[i], step(i) * errors[i + 1]), modulus(load(y0[i]), load(y0[i + 1])),
                         modulus(load(y1[i]), load(y1[i + 1])), rtol(i), atol(i));
        ratios[i / 2] = r * r;
      }
    } else {
      PYODE_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) {
        const A r = scaled_error(std::fabs(step(i) * errors[i]), std::fabs(load(y0[i])), std::fabs(load(y1[i])),
                                 rtol(i), atol(i));
        ratios[i] = static_cast<double>(r) * static_cast<double>(r);
      }
    }
  };
  if (op.rtol_each || op.atol_each) {
    const auto each = [begin](const double* array, double value) {
      return [=](int64_t i) { return static_cast<A>(array ? array[begin + i] : value); };
    };
    fill(each(op.rtol_each, op.rtol), each(op.atol_each, op.atol));
  } else {
    fill([rtol = static_cast<A>(op.rtol)](int64_t) { return rtol; },
         [atol = static_cast<A>(op.atol)](int64_t) { return atol; });
  }
}

void add_to_lanes(const double* ratios, int64_t n, double* lanes) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += ratios[i + l];
  for (int64_t l = 0; i < n; ++i, ++l) lanes[l] += ratios[i];
}

// The sum over numbers [begin, end) of one sample, in an order that depends on nothing but their count.
template <class T, bool kComplex>
double sum_squares(const ErrorNorm& op, const Terms<T>& terms, double dt, int64_t begin, int64_t end) {
  if (op.terms == 0) return 0;
  const auto step = [step = static_cast<arithmetic_t<T>>(dt)](int64_t) { return step; };
  double lanes[kLanes] = {};
  double ratios[kBlock];
  for (int64_t from = begin; from < end; from += kBlock) {
    const int64_t to = from + kBlock < end ? from + kBlock : end;
    square_ratios<T, kComplex>(op, terms, step, from, to, ratios);
    const int64_t n = kComplex ? (to - from) / 2 : to - from;
    add_to_lanes(ratios, n, lanes);
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// The same for the squared ratios of one small row: n numbers, in the same order.
double sum_row(const double* ratios, int64_t n) {
  double lanes[kLanes] = {};
  add_to_lanes(ratios, n, lanes);
  int64_t half = kLanes / 2;
  while (half >= n && half > 1) half /= 2;  // the lanes from n on are 0
  for (; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

template <bool kComplex>
double mean(double sum, int64_t n) {
  return n == 0 ? 0.0 : sum / static_cast<double>(kComplex ? n / 2 : n);
}

// The means of the columns of kSize numbers each, summed in the same order; for vectors, of those in each lane.
template <int64_t kSize, class R>
void mean_columns(R* columns, double* means) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half && l + half < kSize; ++l) columns[l] += columns[l + half];
  const R mean = columns[0] / static_cast<double>(kSize);
  std::memcpy(means, &mean, sizeof mean);
}

// The means of rows of kSize ratios each.
template <int64_t kSize>
void mean_rows(const double* ratios, int64_t rows, double* means) {
  int64_t b = 0;
#if defined(PYODE_SHUFFLE)
  for (; b + lanes<Side> <= rows; b += lanes<Side>) {
    Side columns[kSize];
    read_columns<kSize>(ratios + b * kSize, columns);
    mean_columns<kSize>(columns, means + b);
  }
#endif
  for (; b < rows; ++b) {
    double row[kSize];
    for (int64_t i = 0; i < kSize; ++i) row[i] = ratios[b * kSize + i];
    mean_columns<kSize>(row, means + b);
  }
}

template <class T, bool kComplex>
void error_norm_of(const Layout& layout, const ErrorNorm& op) {
  const auto terms_of = [&](int64_t b) {
    const int64_t row = b * layout.size;
    Terms<T> terms = {nullptr, static_cast<const T*>(op.y0) + row, {}, {}};
    for (int j = 0; j < op.terms; ++j) {
      terms.k[j] = static_cast<const T*>(op.k[j]) + row;
      terms.w[j] = static_cast<arithmetic_t<T>>(op.w[j]);
    }
    return terms;
  };
  if (layout.samples == 1) {
    const Terms<T> terms = terms_of(0);
    for (int64_t s = 0; s < layout.n_segments; ++s) {
      const int64_t begin = layout.segments[s], end = layout.segments[s + 1], n = end - begin;
      const int64_t fair = (n + kMaxParts - 1) / kMaxParts;
      const int64_t part = fair > kPart ? (fair + 1) / 2 * 2 : kPart;
      const int64_t parts = (n + part - 1) / part;
      double partial[kMaxParts];
      parallel_for(parts, threads_for(layout), [&](int64_t p) {
        const int64_t from = begin + p * part, to = from + part < end ? from + part : end;
        partial[p] = sum_squares<T, kComplex>(op, terms, op.dt[0], from, to);
      });
      double sum = 0;
      for (int64_t p = 0; p < parts; ++p) sum += partial[p];
      op.means[s] = mean<kComplex>(sum, n);
    }
    return;
  }
  if (rows_are_small(layout) && op.terms > 0 && !op.rtol_each && !op.atol_each) {
    using A = arithmetic_t<T>;
    constexpr int64_t kWidth = kComplex ? 2 : 1;
    const int64_t size = layout.size / kWidth;  // ratios in a row
    for_small_rows<A>(layout, op.dt, [&](int64_t first, int64_t begin, int64_t end, const A* steps) {
      double ratios[kBlock];
      square_ratios<T, kComplex>(op, terms_of(first), [&](int64_t i) { return steps[i]; }, 0, end - begin, ratios);
      const int64_t rows = (end - begin) / layout.size;
      const auto of_size = [&](auto n) { mean_rows<decltype(n)::value>(ratios, rows, op.means + first); };
      if (layout.n_segments == 1 && with_constant<8>(size, of_size)) return;
      for (int64_t b = 0; b < rows; ++b)
        for (int64_t s = 0; s < layout.n_segments; ++s) {
          const int64_t from = layout.segments[s], count = layout.segments[s + 1] - from;
          const double* const row = ratios + b * size + from / kWidth;
          op.means[s * layout.samples + first + b] = mean<kComplex>(sum_row(row, count / kWidth), count);
        }
    });
    return;
  }
  const int64_t together = layout.size < kChunk ? kChunk / (layout.size + 1) + 1 : 1;
  parallel_for((layout.samples + together - 1) / together, threads_for(layout), [&](int64_t task) {
    const int64_t last = (task + 1) * together < layout.samples ? (task + 1) * together : layout.samples;
    for (int64_t b = task * together; b < last; ++b) {
      const Terms<T> terms = terms_of(b);
      for (int64_t s = 0; s < layout.n_segments; ++s) {
        const int64_t begin = layout.segments[s], end = layout.segments[s + 1];
        const double sum = sum_squares<T, kComplex>(op, terms, op.dt[b], begin, end);
        op.means[s * layout.samples + b] = mean<kComplex>(sum, end - begin);
      }
    }
  });
}

}  // namespace

void error_norm(const Layout& layout, const ErrorNorm& op) {
  with_scalar(layout.scalar, [&](auto kind) {
    using T = decltype(kind);
    if constexpr (sizeof(T) > 2) {
      if (layout.is_complex) return error_norm_of<T, true>(layout, op);
    }
    error_norm_of<T, false>(layout, op);
  });
}

}  // namespace pyode::cpu::PYODE_LEVEL
