// What solves must have in common for what one has made to serve the other.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "inspector.h"

namespace pyode {
namespace bindings {

/// All that a solve depends on, beside func and the numbers of the state.
struct Kind {
  uint64_t dtype = 0, time_dtype = 0;
  std::vector<int64_t> shape, time_shape;
  std::string times;  // as they lie in memory
  py::object others;  // compared by ==
  double rtol = 0, atol = 0;
  int64_t threads = 0;
  bool grad = false, time_grad = false;  // whether gradients are recorded, and whether to the times

  bool operator==(const Kind& other) const {
    return dtype == other.dtype && time_dtype == other.time_dtype && rtol == other.rtol && atol == other.atol &&
           threads == other.threads && grad == other.grad && time_grad == other.time_grad && times == other.times &&
           shape == other.shape && time_shape == other.time_shape && equal(others, other.others);
  }
};

/// Tells solves' kinds.
class Kinds {
 public:
  /// What of Python is asked; all functions are called without arguments.
  struct Surroundings {
    py::object backend;                           // a ContextVar; "reference" if the compiled ops are not wanted
    py::object grad_enabled, transform, threads;  // the second returns None where there is none
    py::object forward_mode;                      // a module whose _current_level is negative where there is none
  };

  Kinds(const Inspector& inspector, Surroundings surroundings) : inspector_(inspector), ask_(std::move(surroundings)) {}
  Kinds(const Kinds&) = delete;

  /// The kind of a solve of a plain tensor in memory at times there, with tolerances that are numbers; null for all
  /// others, and where torch transforms what it is told.
  std::shared_ptr<Kind> of(py::handle y0, py::handle t, py::handle rtol, py::handle atol, py::object others) const {
    if (!inspector_.is_tensor(y0) || !inspector_.is_tensor(t) || !PyFloat_CheckExact(rtol.ptr()) ||
        !PyFloat_CheckExact(atol.ptr()))
      return nullptr;
    Look state, times;
    if (!called_plainly() || !lies_on_cpu(y0, state) || !lies_on_cpu(t, times) || times.bytes > kMostTimes)
      return nullptr;
    auto kind = std::make_shared<Kind>();
    kind->dtype = state.dtype;
    kind->shape = std::move(state.shape);
    kind->time_dtype = times.dtype;
    kind->time_shape = std::move(times.shape);
    kind->times.assign(static_cast<const char*>(times.data), static_cast<size_t>(times.bytes));
    kind->others = std::move(others);
    kind->rtol = PyFloat_AS_DOUBLE(rtol.ptr());
    kind->atol = PyFloat_AS_DOUBLE(atol.ptr());
    kind->threads = integer(call(ask_.threads));
    kind->grad = is_true(call(ask_.grad_enabled));
    kind->time_grad = kind->grad && is_true(attribute(t, PYODE_NAME(requires_grad)));
    return kind;
  }

 private:
  static constexpr int64_t kMostTimes = 1 << 20;  // bytes that are copied and compared

  /// Whether a tensor is used as it lies in memory.
  bool lies_on_cpu(py::handle x, Look& look) const {
    return inspector_.look(x, look) && look.on_cpu && look.is_contiguous &&
           !(look.may_be_lazy &&
             (is_true(call_method(x, PYODE_NAME(is_neg))) || is_true(call_method(x, PYODE_NAME(is_conj)))));
  }

  /// Whether the solve is for the compiled ops, and none of torch's transforms is under way.
  bool called_plainly() const {
    PyObject* backend = nullptr;
    if (PyContextVar_Get(ask_.backend.ptr(), nullptr, &backend) != 0) throw py::error_already_set();
    const auto wanted = py::reinterpret_steal<py::object>(backend);
    return PyUnicode_CompareWithASCIIString(wanted.ptr(), "reference") != 0 && call(ask_.transform).is_none() &&
           integer(attribute(ask_.forward_mode, PYODE_NAME(_current_level))) < 0;
  }

  const Inspector& inspector_;
  const Surroundings ask_;
};

}  // namespace bindings
}  // namespace pyode
