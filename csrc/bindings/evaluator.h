// Calls func.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "dlpack.h"

namespace pyode {
namespace bindings {

/// A state or a derivative, and where its numbers are.
struct State {
  py::object tensor;
  void* data = nullptr;
};

/// What is called for a derivative: func itself, if what it returns can be used without a look from Python, or
/// `dynamics`, a RightHandSide (pyode/_ops/contract.py). Evaluations made directly are counted at the end.
class Evaluator {
 public:
  explicit Evaluator(py::handle dynamics) : dynamics_(dynamics) { look_for_direct(); }
  Evaluator(const Evaluator&) = delete;
  ~Evaluator() {
    if (n_direct_ == 0) return;
    const auto n = py::reinterpret_steal<py::object>(PyLong_FromSsize_t(n_direct_));
    PyObject* const count = PyObject_CallMethodOneArg(dynamics_.ptr(), PYODE_NAME(count), n.ptr());
    if (count == nullptr) PyErr_Clear();
    Py_XDECREF(count);
  }

  /// Asks again whether func may be called directly.
  void look_for_direct() {
    if (func_) return;
    const py::object direct = attribute(dynamics_, PYODE_NAME(direct));
    if (direct.is_none()) return;
    const auto parts = py::reinterpret_borrow<py::tuple>(direct);
    func_ = parts[0], type_ = parts[1], dtype_ = parts[2], shape_ = parts[3], device_ = parts[4];
    exchange_ = Exchange(parts[5]), watch_ = parts[6].cast<bool>(), settle_ = parts[7];
  }

  State operator()(py::handle t, py::handle y) {
    PyObject* arguments[] = {t.ptr(), y.ptr()};
    // A start of the user's may have been written to; other states are new.
    if (!func_ || (n_direct_ == 0 && is_written(y)))
      return with_data(checked(PyObject_Vectorcall(dynamics_.ptr(), arguments, 2, nullptr)));
    ++n_direct_;
    State k{checked(PyObject_Vectorcall(func_.ptr(), arguments, 2, nullptr)), nullptr};
    if (fits(k, y) && is_ours(k.tensor)) return k;
    return with_data(
        checked(PyObject_CallMethodObjArgs(dynamics_.ptr(), PYODE_NAME(accept), k.tensor.ptr(), y.ptr(), nullptr)));
  }

 private:
  bool is_written(py::handle y) const { return watch_ && integer(attribute(y, PYODE_NAME(_version))) != 0; }

  static State with_data(py::object tensor) {
    void* const data = address(tensor);
    return {std::move(tensor), data};
  }

  /// Whether k can be used as it is; then its data are found.
  bool fits(State& k, py::handle y) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(k.tensor.ptr())) != type_.ptr()) return false;
    return (exchange_ ? is_like(k, y) : is_as_expected(k)) && !is_written(y);
  }

  bool is_like(State& k, py::handle y) {
    if (!knows_y_) {
      if (!exchange_.describe(y, y_)) return false;
      shape_of_y_.assign(y_.shape, y_.shape + y_.dims);
      knows_y_ = true;
    }
    Described found;
    if (!exchange_.describe(k.tensor, found)) return false;
    k.data = found.data;
    return found.dtype == y_.dtype && found.device == y_.device && found.dims == y_.dims &&
           std::equal(found.shape, found.shape + found.dims, shape_of_y_.begin()) && found.is_contiguous();
  }

  bool is_as_expected(State& k) const {
    const py::object& tensor = k.tensor;
    if (!attribute(tensor, PYODE_NAME(dtype)).is(dtype_) || !equal(attribute(tensor, PYODE_NAME(shape)), shape_) ||
        !equal(attribute(tensor, PYODE_NAME(device)), device_) ||
        call_method(tensor, PYODE_NAME(is_contiguous)).ptr() != Py_True)
      return false;
    k.data = address(tensor);
    return true;
  }

  /// Whether func has let go of what it returned. Of the first result the memory is looked at, too.
  bool is_ours(const py::object& k) {
    if (Py_REFCNT(k.ptr()) != 1) return false;
    if (!settle_.is_none()) {
      if (checked(PyObject_CallOneArg(settle_.ptr(), k.ptr())).ptr() != Py_True) {
        func_ = py::object();
        return false;
      }
      settle_ = py::none();
    }
    return true;
  }

  py::handle dynamics_;
  py::object func_, type_, dtype_, shape_, device_, settle_;
  Exchange exchange_{py::none()};
  Described y_;  // any state; its shape is that beside
  std::vector<int64_t> shape_of_y_;
  bool watch_ = false, knows_y_ = false;
  Py_ssize_t n_direct_ = 0;
};

}  // namespace bindings
}  // namespace pyode
