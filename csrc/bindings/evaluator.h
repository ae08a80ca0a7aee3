// Calls func.
#pragma once

#include <utility>

#include "inspector.h"

namespace pyode {
namespace bindings {

/// A state or a derivative, and where its numbers are.
struct State {
  py::object tensor;
  void* data = nullptr;
};

/// The calls of a func: whether they may be made without a look from Python at what they return, and their number.
/// The func itself is Python's to hold, which looks for cycles.
struct Calls {
  const Inspector& inspector;
  const bool direct;  // whether func returns what can be used as it is, if it is like its input
  const bool watch;   // whether the version of func's input is to stay 0
  int64_t n = 0;
  bool settled = false, copies = false;  // whether func has let go of what it returned first, or holds it

  /// From now on they are another func's.
  void restart() {
    n = 0;
    settled = copies = false;
  }

  /// Whether func has let go of k, which it returned first; if not, what it returns is copied from now on.
  bool settle(py::handle k) {
    settled = inspector.is_unshared(k);
    copies = !settled;
    return settled;
  }
};

/// What is called for a derivative: func itself, where `dynamics`, a RightHandSide (pyode/_ops/contract.py), says so
/// and what func returns can be used without a look from Python, or else `dynamics`.
class Evaluator {
 public:
  explicit Evaluator(py::handle dynamics) : dynamics_(dynamics) { look_for_direct(); }
  Evaluator(const Evaluator&) = delete;

  /// Asks again whether func may be called directly.
  void look_for_direct() {
    if (calls_ != nullptr) return;
    found_ = attribute(dynamics_, PYODE_NAME(calls));
    if (found_.is_none()) return;
    Calls& calls = found_.cast<Calls&>();
    if (!calls.direct || calls.copies) return;
    calls_ = &calls;
    func_ = attribute(dynamics_, PYODE_NAME(func));
  }

  State operator()(py::handle t, py::handle y) {
    PyObject* arguments[] = {t.ptr(), y.ptr()};
    // A start of the user's may have been written to; other states are new.
    if (calls_ == nullptr || (!std::exchange(began_, true) && is_written(y)))
      return with_data(checked(PyObject_Vectorcall(dynamics_.ptr(), arguments, 2, nullptr)));
    ++calls_->n;
    State k{checked(PyObject_Vectorcall(func_.ptr(), arguments, 2, nullptr)), nullptr};
    if (fits(k, y) && is_ours(k.tensor)) return k;
    return with_data(
        checked(PyObject_CallMethodObjArgs(dynamics_.ptr(), PYODE_NAME(accept), k.tensor.ptr(), y.ptr(), nullptr)));
  }

 private:
  bool is_written(py::handle y) const { return calls_->watch && integer(attribute(y, PYODE_NAME(_version))) != 0; }

  static State with_data(py::object tensor) {
    void* const data = address(tensor);
    return {std::move(tensor), data};
  }

  /// Whether k can be used as it is; then its data are found.
  bool fits(State& k, py::handle y) {
    const Inspector& inspector = calls_->inspector;
    if (!inspector.is_tensor(k.tensor)) return false;
    knows_y_ = knows_y_ || inspector.look(y, y_);
    if (!knows_y_ || !inspector.look(k.tensor, k_)) return false;
    k.data = k_.data;
    return k_.is_like(y_) && k_.is_contiguous && !is_written(y);
  }

  /// Whether func has let go of what it returned. Of the first result the memory is looked at, too.
  bool is_ours(const py::object& k) {
    if (Py_REFCNT(k.ptr()) != 1) return false;
    if (calls_->settled || calls_->settle(k)) return true;
    calls_ = nullptr;
    return false;
  }

  py::handle dynamics_;
  py::object found_, func_;
  Calls* calls_ = nullptr;
  Look y_, k_;  // any state, and a derivative
  bool knows_y_ = false, began_ = false;
};

}  // namespace bindings
}  // namespace pyode
