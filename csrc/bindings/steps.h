// The loops over a step's stages, and over the steps after which Python has nothing to decide.
#pragma once

#include <chrono>
#include <initializer_list>

#include "controller.h"
#include "evaluator.h"

namespace pyode {
namespace bindings {

/// The state and the derivatives of a step under way.
class Step {
 public:
  /// ks has a place for each derivative.
  Step(const OwnedLayout& layout, py::object y, const py::list& ks)
      : where(layout), y_{std::move(y), nullptr}, ks_(ks) {
    y_.data = address(y_.tensor);
    for (size_t j = 0; j < ks.size() && j <= kMaxStages; ++j)
      if (const py::handle k = PyList_GET_ITEM(ks.ptr(), static_cast<Py_ssize_t>(j)); !k.is_none())
        k_data_[j] = address(k);
  }

  const OwnedLayout& where;

  /// Makes k the j-th derivative.
  void put(size_t j, State k) {
    if (j >= ks_.size()) throw py::value_error("a step: there are too few places for derivatives");
    k_data_[j] = k.data;
    if (PyList_SetItem(ks_.ptr(), static_cast<Py_ssize_t>(j), k.tensor.release().ptr()) != 0)
      throw py::error_already_set();
  }

  /// Makes the from-th derivative the to-th, too.
  void repeat(size_t from, size_t to) {
    PyObject* const k = PyList_GET_ITEM(ks_.ptr(), static_cast<Py_ssize_t>(from));
    Py_INCREF(k);
    if (PyList_SetItem(ks_.ptr(), static_cast<Py_ssize_t>(to), k) != 0) throw py::error_already_set();
    k_data_[to] = k_data_[from];
  }

  /// base + dt sum_j w_j k_j as a new state. What is given for `out` goes first, so that its memory may serve again.
  void combine(const void* base, const Weights& weights, const double* dt, State& out) const {
    StageCombine op;
    weights.fill(op, [&](int j) { return k_data_[j]; });
    combine(op, base, dt, out);
  }

  void combine(StageCombine op, const void* base, const double* dt, State& out) const {
    out.tensor = py::object();
    const Supply::Item& next = where.states.take(y_.tensor);
    out = {py::reinterpret_borrow<py::object>(next.whole()), next.data};
    op.y = base;
    op.dt = dt;
    op.out = out.data;
    PYODE_DISPATCH(where, stage_combine, op);
  }

  /// The state at the end.
  void combine(const Weights& weights, const double* dt) { combine(y_.data, weights, dt, y1_); }

  /// Evaluates n stages after the first at `time_of(j)`: for each a state, of which the last is the end, and its
  /// derivative. The first of these states may be given.
  template <class TimeOf>
  void evaluate(const Table& table, size_t n, const double* dt, Evaluator& evaluator, TimeOf time_of,
                py::handle given = py::none()) {
    if (n > table.rows.size()) throw py::value_error("a step: there are more times than rows");
    for (size_t j = 0; j < n; ++j) {
      if (j == 0 && !given.is_none()) {
        put(1, evaluator(time_of(0), given));
        continue;
      }
      combine(table.rows[j], dt);
      put(j + 1, evaluator(time_of(j), y1_.tensor));
    }
  }

  /// Leaves the mean squares of the scaled error where the controller looks for them.
  void measure(const Table& table, const Controller& controller, const ErrorNorm& tolerances) const {
    ErrorNorm op = tolerances;
    table.error.fill(op, [&](int j) { return k_data_[j]; });
    op.y0 = y_.data;
    op.y1 = y1_.data;
    op.dt = controller.dt();
    op.means = controller.means();
    op.parts = controller.op.parts;
    PYODE_DISPATCH(where, error_norm, op);
  }

  /// Writes all outputs that the step has passed to their rows of `out`.
  void put_out(const Controller& controller, const Interpolant& interpolant, void* out) const {
    Interpolate op = interpolant.op;
    for (int j = 0; j < op.terms; ++j) op.k[j] = k_data_[interpolant.stages[static_cast<size_t>(j)]];
    op.y = y_.data;
    op.state = controller.op.state;
    op.grid = controller.op.grid;
    op.out = out;
    op.out_stride = where.layout.samples * where.layout.size;
    PYODE_DISPATCH(where, interpolate, op);
  }

  /// Leaves the mean squares of dt sum_j w_j k_j over atol + rtol |y| where the controller looks for them: those of a
  /// first step's slope behind the others.
  void measure_first(std::initializer_list<std::pair<double, const void*>> terms, const double* dt,
                     const Controller& controller, const ErrorNorm& tolerances, bool behind) const {
    ErrorNorm op = tolerances;
    op.terms = 0;
    for (const auto& [weight, k] : terms) {
      op.w[op.terms] = weight;
      op.k[op.terms++] = k;
    }
    op.y0 = op.y1 = y_.data;
    op.dt = dt;
    op.parts = controller.op.parts;
    op.means = controller.means() + (behind ? controller.op.n_segments * op.parts * where.layout.samples : 0);
    PYODE_DISPATCH(where, error_norm, op);
  }

  const void* derivative(size_t j) const { return k_data_[j]; }

  /// Copies the start or the end to a place.
  void copy_start(void* out) const { copy(y_, out); }
  void copy_end(void* out) const { copy(y1_, out); }
  void copy(const State& state, void* out) const {
    StageCombine op;
    op.terms = 0;
    op.y = state.data;
    op.dt = nullptr;
    op.out = out;
    PYODE_DISPATCH(where, stage_combine, op);
  }

  /// Goes on from the step's end.
  void move_on() { y_ = std::exchange(y1_, State()); }

  const State& start() const { return y_; }
  const State& end() const { return y1_; }

 private:
  State y_, y1_;
  py::list ks_;
  const void* k_data_[kMaxStages + 1] = {};
};

/// All evaluations of a step after its first, of whose states the first may be given. Returns the last state.
inline py::object stages(const OwnedLayout& where, const Table& table, py::object y, const py::list& ks, py::handle dt,
                         const py::tuple& times, py::handle dynamics, py::handle given) {
  Step step(where, std::move(y), ks);
  Evaluator evaluator(dynamics);
  step.evaluate(
      table, times.size(), address<double>(dt), evaluator,
      [&](size_t j) { return py::handle(PyTuple_GET_ITEM(times.ptr(), static_cast<Py_ssize_t>(j))); }, given);
  return (times.empty() ? step.start() : step.end()).tensor;
}

/// The steps of an adaptive loop, with all that stays the same through its solves.
class Steps {
 public:
  /// Args:
  ///   read_flags: tells the flags where the controller has left them on the device.
  ///   one: a step size of 1 for each sample.
  Steps(OwnedLayout& layout, const Table& table, const Interpolant& interpolant, Controller& controller,
        py::object rtol, py::object atol, py::object read_flags, py::object one)
      : where_(layout),
        table_(table),
        interpolant_(interpolant),
        controller_(controller),
        rtol_(std::move(rtol)),
        atol_(std::move(atol)),
        read_flags_(std::move(read_flags)),
        one_(std::move(one)) {
    read_tolerances(rtol_, atol_, tolerances_);
  }
  Steps(const Steps&) = delete;

  size_t n_derivatives() const { return table_.rows.size() + 1; }

  /// Takes steps from y until there is something for Python to do: a discontinuity, some samples moving and others not,
  /// the end. Returns the start and the end of the last one, its flags, and `out`: all outputs that were passed are
  /// written to their rows of it. Where t0 is given, the solve begins, see `begin`, and `out` makes them for the start:
  /// after the first evaluation, which has brought what that needs into the cache. The first output is the start.
  py::tuple take(py::object y, const py::list& ks, py::handle dynamics, py::object out, py::handle t0) {
    Step step(where_, std::move(y), ks);
    Evaluator evaluator(dynamics);
    int64_t flags = kAnyRunning;
    if (!t0.is_none()) {
      const auto began = std::chrono::steady_clock::now();
      step.put(0, evaluator(t0, step.start().tensor));
      where_.layout.func_is_long = std::chrono::steady_clock::now() - began > std::chrono::microseconds(100);
      out = checked(PyObject_CallOneArg(out.ptr(), step.start().tensor.ptr()));
      step.copy_start(address(out));
      flags = begin(step, evaluator);
      if (!(flags & kAnyRunning)) return py::make_tuple(step.start().tensor, step.start().tensor, flags, out);
    }
    void* const outputs = address(out);
    for (;;) {
      step.evaluate(table_, table_.rows.size(), controller_.dt(), evaluator,
                    [&](size_t j) { return controller_.planned().view(j); });
      step.measure(table_, controller_, tolerances_);
      flags = run(Phase::judge);
      if (flags & kAnyOutput) step.put_out(controller_, interpolant_, outputs);
      switch (flags & ~kAnyOutput) {
        case kAnyRunning | kAnyAccepted:
          step.move_on();
          step.repeat(table_.rows.size(), 0);
          break;
        case kAnyRunning | kAnyStayed:
          break;
        default:
          return py::make_tuple(step.start().tensor, step.end().tensor, flags & ~kAnyOutput, out);
      }
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      evaluator.look_for_direct();
    }
  }

 private:
  /// Chooses the first step, with another evaluation, and returns the flags (Hairer, Norsett, Wanner I, II.4).
  int64_t begin(Step& step, Evaluator& evaluator) {
    const void* const y = step.start().data;
    const double* const one = address<const double>(one_);
    step.measure_first({{1, y}}, one, controller_, tolerances_, false);
    step.measure_first({{1, step.derivative(0)}}, one, controller_, tolerances_, true);
    controller_.run(Phase::try_first, 0);
    StageCombine euler;
    euler.terms = 1;
    euler.w[0] = 1;
    euler.k[0] = step.derivative(0);
    State trial;
    step.combine(euler, y, controller_.dt(), trial);
    const State k = evaluator(controller_.planned().whole(), trial.tensor);
    step.measure_first({{1, k.data}, {-1, step.derivative(0)}}, controller_.dt(), controller_, tolerances_, false);
    evaluator.look_for_direct();
    return run(Phase::choose_first);
  }

  int64_t run(Phase phase) {
    const int64_t flags = controller_.run(phase, 0);
    return flags < 0 ? integer(read_flags_(flags)) : flags;
  }

  OwnedLayout& where_;
  const Table& table_;
  const Interpolant& interpolant_;
  Controller& controller_;
  py::object rtol_, atol_, read_flags_, one_;
  ErrorNorm tolerances_ = {};
};

/// Solves by the steps of one before, whose only sample nobody looked at, and which did not come to a discontinuity.
class SolveAgain {
 public:
  /// Args: an AdaptiveLoop (pyode/stepping/adaptive.py).
  explicit SolveAgain(py::object loop)
      : loop_(std::move(loop)),
        dynamics_(loop_.attr("dynamics")),
        start_(call_method(loop_, PYODE_NAME(start))),
        make_(loop_.attr("new_outputs")),
        steps_(loop_.attr("steps").cast<Steps&>()),
        calls_(dynamics_.attr("calls").cast<Calls&>()),
        empty_(py::make_tuple(py::none()) * py::int_(steps_.n_derivatives())) {}

  /// Returns the outputs.
  py::object operator()(py::handle func, py::object y0) {
    set(func);
    const py::list ks(empty_);
    const bool touched = integer(attribute(start_, PYODE_NAME(_version))) != 0 ||
                         attribute(start_, PYODE_NAME(requires_grad)).ptr() != Py_False;
    const py::tuple end =
        steps_.take(std::move(y0), ks, dynamics_, make_, touched ? call_method(loop_, PYODE_NAME(start)) : start_);
    if (integer(end[2]) & kAnyFailed) loop_.attr("fail")(end[0], ks[0]);
    set(py::none());
    return end[3];
  }

 private:
  void set(py::handle func) {
    if (PyObject_SetAttr(dynamics_.ptr(), PYODE_NAME(func), func.ptr()) != 0) throw py::error_already_set();
    calls_.restart();
  }

  py::object loop_, dynamics_, start_, make_;
  Steps& steps_;
  Calls& calls_;
  py::object empty_;
};

}  // namespace bindings
}  // namespace pyode
