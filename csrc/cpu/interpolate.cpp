#include "levels.h"
#include "rows.h"

namespace pyode::cpu::PYODE_LEVEL {
namespace {

constexpr int kAtOnce = 8;     // weights that a register holds
constexpr int kScalarRow = 8;  // below so many numbers a loop over them is not worth a vector's

// The weights of all terms at a position, to the bit as interpolant_weight has them, several side by side.
class Weights {
 public:
  explicit Weights(const Interpolate& op) : op_(op), terms_((op.terms + kAtOnce - 1) / kAtOnce * kAtOnce) {
    for (int j = 0; j < op.terms; ++j)
      for (int p = 0; p < op.degree; ++p) c_[p][j] = op.c[j][p];
  }

  void at(double x, double* weights) const {
    if (x == 1) {
      std::memcpy(weights, op_.end, sizeof op_.end);
      return;
    }
    for (int from = 0; from < terms_; from += kAtOnce) {
      double w[kAtOnce] = {};
      for (int p = op_.degree - 1; p >= 0; --p)
        for (int j = 0; j < kAtOnce; ++j) w[j] = fused_multiply_add(w[j], x, c_[p][from + j]);
      for (int j = 0; j < kAtOnce; ++j) weights[from + j] = w[j] * x;
    }
  }

 private:
  const Interpolate& op_;
  int terms_;
  double c_[kMaxDegree][kMaxStages] = {};
};

// sum_row for so few numbers that a vector would not be full.
template <class T>
void sum_short_row(int n, const Terms<T>& terms, int64_t size, double dt) {
  using A = arithmetic_t<T>;
  for (int64_t i = 0; i < size; ++i) {
    A sum = terms.w[0] * load(terms.k[0][i]);
    for (int j = 1; j < n; ++j) sum = fused_multiply_add(terms.w[j], load(terms.k[j][i]), sum);
    terms.out[i] = store<T>(advance_state(load(terms.y[i]), static_cast<A>(dt), sum));
  }
}

}  // namespace

void interpolate(const Layout& layout, const Interpolate& op) {
  if (layout.size == 0) return;
  const Weights interpolant(op);
  with_scalar(layout.scalar, [&](auto kind) {
    using T = decltype(kind);
    // A big sample is cut into chunks; small samples share one.
    const int64_t cuts = (layout.size + kChunk - 1) / kChunk;
    const int64_t together = layout.size < kChunk ? kChunk / layout.size : 1;
    const int64_t groups = (layout.samples + together - 1) / together;
    parallel_for(groups * cuts, threads_for(layout), [&](int64_t task) {
      const int64_t first = task / cuts * together, begin = task % cuts * kChunk;
      const int64_t last = first + together < layout.samples ? first + together : layout.samples;
      const int64_t end = begin + kChunk < layout.size ? begin + kChunk : layout.size;
      Terms<T> terms;
      for (int64_t b = first; b < last; b += kBlock) {
        int64_t passing[kBlock], n_passing = 0;  // without a branch for each sample, which could not be predicted
        for (int64_t i = b; i < last && i < b + kBlock; ++i) {
          passing[n_passing] = i;
          n_passing += passes_outputs(op.state, i);
        }
        for (int64_t p = 0; p < n_passing; ++p) {
          const int64_t sample = passing[p];
          const Sample s = load_sample(op.state, sample);
          for (int64_t i = s.output_begin; i < s.output_end; ++i) {
            double weights[kMaxStages];
            interpolant.at(output_position(s, output_time(op.grid, i, sample)), weights);
            const int64_t row = sample * layout.size;
            terms.out = static_cast<T*>(op.out) + i * op.out_stride + row;
            terms.y = static_cast<const T*>(op.y) + row;
            int n = 0;
            for (int j = 0; j < op.terms; ++j) {
              if (weights[j] == 0) continue;
              terms.k[n] = static_cast<const T*>(op.k[j]) + row;
              terms.w[n++] = static_cast<arithmetic_t<T>>(weights[j]);
            }
            if (n > 0 && layout.size < kScalarRow)
              sum_short_row(n, terms, layout.size, s.dt_prev);
            else
              sum_row(n, terms, begin, end, s.dt_prev);
          }
        }
      }
    });
  });
}

}  // namespace pyode::cpu::PYODE_LEVEL
