// The loops over the steps of a given grid: of explicit Runge-Kutta methods, and of Adams methods.
#pragma once

#include <algorithm>
#include <cmath>

#include "../core/step.h"
#include "steps.h"

namespace pyode {
namespace bindings {

/// A given grid, and the times of the step under way.
class GridTimes {
 public:
  /// Args:
  ///   times: [steps, stages] as func sees them, of `bytes` each; sizes: [steps] double.
  ///   like, make_times, storage_uses: of a step's times, see Supply.
  GridTimes(const OwnedLayout& layout, py::object times, py::object sizes, int64_t bytes, py::object like,
            py::object make_times, py::object storage_uses)
      : where(layout),
        times_(std::move(times)),
        sizes_(std::move(sizes)),
        like_(std::move(like)),
        row_bytes_(static_cast<size_t>(bytes) * py::len(like_)),
        supply_(std::move(make_times), std::move(storage_uses)) {}

  const OwnedLayout& where;

  int64_t under_way = -1;  // the step whose times were asked for last

  const double* size_of(int64_t n) const { return address<const double>(sizes_) + n; }

  /// Those of step n, behind a whole that they are views of.
  py::tuple times_of(int64_t n) {
    under_way = n;
    if (where.cuda) {
      const py::object row = times_[py::int_(n)];
      return py::make_tuple(row) + py::reinterpret_borrow<py::tuple>(call_method(row, PYODE_NAME(unbind)));
    }
    const Supply::Item& item = supply_.take(like_);
    memcpy(item.data, address<const char>(times_) + static_cast<size_t>(n) * row_bytes_, row_bytes_);
    return item.tensors;
  }

 private:
  py::object times_, sizes_, like_;
  size_t row_bytes_;
  Supply supply_;
};

inline py::handle view(const py::tuple& times, size_t j) {
  return PyTuple_GET_ITEM(times.ptr(), static_cast<Py_ssize_t>(j) + 1);
}

/// Goes on from a step's end, which goes to row n + 1 of `out`, if it is given.
inline void go_on(Step& step, Evaluator& evaluator, int64_t n, char* out, int64_t out_bytes) {
  if (out != nullptr) step.copy_end(out + (n + 1) * out_bytes);
  step.move_on();
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  evaluator.look_for_direct();
}

/// Takes the steps from `begin` to before `end`. The ends of all but the last go to `out`, if it is given: that of step
/// n to row n + 1. Returns the start and the end of the last one.
inline py::tuple take_grid_steps(GridTimes& grid, const Table& table, py::object y, const py::list& ks,
                                 py::handle dynamics, int64_t begin, int64_t end, py::handle out, int64_t out_bytes) {
  Step step(grid.where, std::move(y), ks);
  Evaluator evaluator(dynamics);
  for (int64_t n = begin; n < end; ++n) {
    if (n > begin) go_on(step, evaluator, n - 1, address<char>(out), out_bytes);
    const py::tuple times = grid.times_of(n);
    step.put(0, evaluator(view(times, 0), step.start().tensor));
    step.evaluate(table, table.rows.size(), grid.size_of(n), evaluator, [&](size_t j) { return view(times, j + 1); });
    step.combine(table.weights, grid.size_of(n));
  }
  return py::make_tuple(step.start().tensor, step.end().tensor);
}

/// An Adams method: the weights of its predictor, and of its corrector if it is implicit, after 1, 2, ... values of f.
/// The first is that of f at the step's end, the second that at its start, and so on backwards.
struct AdamsTable {
  std::vector<Weights> predictor, corrector;
  int64_t max_iters;

  AdamsTable(const py::tuple& predictors, const py::tuple& correctors, int64_t most_iterations)
      : max_iters(most_iterations) {
    for (py::handle row : predictors) predictor.emplace_back(py::reinterpret_borrow<py::tuple>(row));
    for (py::handle row : correctors) corrector.emplace_back(py::reinterpret_borrow<py::tuple>(row));
  }
};

/// Whether every number of two steps' rises agrees within the tolerances, relative to the rises.
template <class T>
bool all_within(const void* before, const void* after, int64_t n, T rtol, T atol) {
  const T* const a = static_cast<const T*>(before);
  const T* const b = static_cast<const T*>(after);
  constexpr int64_t kBlock = 256;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    bool within = true;
    for (int64_t i = begin; i < n && i < begin + kBlock; ++i)
      within &= scaled_error<T>(std::fabs(b[i] - a[i]), std::fabs(a[i]), std::fabs(b[i]), rtol, atol) < 1;
    if (!within) return false;
  }
  return true;
}

/// An Adams step's equation, solved by functional iteration. On the CPU.
class AdamsCorrector {
 public:
  AdamsCorrector(const OwnedLayout& where, py::handle zero, py::handle rtol, py::handle atol)
      : zero_(address(zero)),
        each_(where.layout),
        means_(static_cast<size_t>(std::max(each_.size, each_.n_segments))) {  // of empty parts there may be more
    read_tolerances(rtol, atol, change_);
    change_.terms = 2;
    change_.w[0] = 1;
    change_.w[1] = -1;
    change_.dt = &one_;
    change_.parts = 1;
    for (int64_t d = 0; d <= each_.size; d += where.layout.is_complex ? 2 : 1) offsets_.push_back(d);
    each_.segments = offsets_.data();
    each_.n_segments = static_cast<int64_t>(offsets_.size()) - 1;
    each_.longest_segment = where.layout.is_complex ? 2 : 1;
  }

  /// Whether the iteration has come to rest. The derivative at the end is put into its place.
  bool solve(Step& step, const Weights& predictor, const Weights& corrector, int64_t max_iters, const double* dt,
             Evaluator& evaluator, py::handle t1) {
    State before, after, state;
    step.combine(zero_, predictor, dt, before);
    for (int64_t i = 0; i < max_iters; ++i) {
      StageCombine sum;
      sum.terms = 1;
      sum.w[0] = 1;
      sum.k[0] = before.data;
      step.combine(sum, step.start().data, &one_, state);
      step.put(0, evaluator(t1, state.tensor));
      step.combine(zero_, corrector, dt, after);
      if (agree(step.where, before.data, after.data)) return true;
      std::swap(before, after);
    }
    return false;
  }

 private:
  /// See `all_within`; what tells it at once is looked at first.
  bool agree(const OwnedLayout& where, const void* before, const void* after) {
    change_.y0 = change_.k[1] = before;
    change_.y1 = change_.k[0] = after;
    change_.means = means_.data();
    PYODE_DISPATCH(where, error_norm, change_);
    double largest = 0, sum = 0;
    for (int64_t s = 0; s < where.layout.n_segments; ++s) {
      largest = means_[s] > largest || !is_finite(means_[s]) ? means_[s] : largest;
      sum += means_[s] * static_cast<double>(where.layout.segments[s + 1] - where.layout.segments[s]);
    }
    if (!(largest < 1)) return false;
    if (sum < 1) return true;  // then the largest square is smaller, too
    const bool plain = change_.rtol_each == nullptr && change_.atol_each == nullptr && !where.layout.is_complex;
    const int64_t n = where.layout.samples * where.layout.size;
    if (plain && where.layout.scalar == Scalar::float64)
      return all_within<double>(before, after, n, change_.rtol, change_.atol);
    if (plain && where.layout.scalar == Scalar::float32)
      return all_within<float>(before, after, n, static_cast<float>(change_.rtol), static_cast<float>(change_.atol));
    cpu::error_norm(each_, change_);
    for (int64_t i = 0; i < each_.n_segments; ++i)
      if (!(means_[i] < 1)) return false;
    return true;
  }

  const void* zero_;
  const double one_ = 1;
  Layout each_;  // with every number a segment of its own
  std::vector<int64_t> offsets_;
  std::vector<double> means_;
  ErrorNorm change_ = {};
};

/// The same for an Adams method. ks has a place for f at a step's end, and behind it m values of f, the newest first,
/// and places for more. Ends early where an equation was not solved. Returns the start and the end of the last step,
/// how many values of f there are, the last step's number, and whether its equation was solved.
inline py::tuple take_adams_steps(GridTimes& grid, const AdamsTable& table, py::object y, const py::list& ks, size_t m,
                                  py::handle dynamics, int64_t begin, int64_t end, py::handle zero, py::handle rtol,
                                  py::handle atol, py::handle out, int64_t out_bytes) {
  Step step(grid.where, std::move(y), ks);
  Evaluator evaluator(dynamics);
  AdamsCorrector equation(grid.where, zero, rtol, atol);
  const size_t most = table.predictor.size();
  bool solved = true;
  int64_t n = begin - 1;
  while (n + 1 < end && solved) {
    ++n;
    if (n > begin) go_on(step, evaluator, n - 1, address<char>(out), out_bytes);
    const py::tuple times = grid.times_of(n);
    State slope = evaluator(view(times, 0), step.start().tensor);
    m = m < most ? m + 1 : most;
    for (size_t j = m; j > 1; --j) step.repeat(j - 1, j);
    step.put(1, std::move(slope));
    const double* const dt = grid.size_of(n);
    if (table.corrector.empty()) {
      step.combine(table.predictor[m - 1], dt);
      continue;
    }
    solved = equation.solve(step, table.predictor[m - 1], table.corrector[m - 1], table.max_iters, dt, evaluator,
                            view(times, 1));
    step.combine(table.corrector[m - 1], dt);
  }
  return py::make_tuple(step.start().tensor, step.end().tensor, m, n, solved);
}

}  // namespace bindings
}  // namespace pyode
