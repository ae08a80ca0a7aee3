// Solves like one before: what makes them alike, and the loop that the last one has left.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "steps.h"

namespace pyode {
namespace bindings {

/// What solves must have in common for one's loop to serve the other.
struct Kind {
  uint64_t dtype = 0, time_dtype = 0;
  std::vector<int64_t> shape, time_shape;
  std::string times;  // as they lie in memory
  py::object method;
  double rtol = 0, atol = 0;
  int64_t threads = 0;
  bool grad = false;

  bool operator==(const Kind& other) const {
    return dtype == other.dtype && time_dtype == other.time_dtype && rtol == other.rtol && atol == other.atol &&
           threads == other.threads && grad == other.grad && times == other.times && shape == other.shape &&
           time_shape == other.time_shape && equal(method, other.method);
  }
};

/// Loops of adaptive and of fixed steps that nobody uses, the least recently used first. Each thread has its own; one
/// at work is not among them, as func may solve, too.
class IdleLoops {
 public:
  /// What of Python is asked; all functions are called without arguments.
  struct Surroundings {
    py::object compiled_type;  // of funcs that keep their last solve themselves
    py::tuple callbacks;       // names of attributes that a func must not have
    py::object backend;        // a ContextVar; "reference" if the compiled ops are not wanted
    py::object grad_enabled, inference_mode, transform, threads;  // the third returns None where there is none
    py::object forward_mode;  // a module whose _current_level is negative where there is none
  };

  IdleLoops(const Inspector& inspector, Surroundings surroundings, size_t most)
      : inspector_(inspector), ask_(std::move(surroundings)), most_(most) {}
  IdleLoops(const IdleLoops&) = delete;

  /// Args: those of odeint. Returns what such a solve gives, where a SolveAgain serves; or a loop for it, or None; and
  /// the solve's kind, or None if there is to be no loop.
  py::tuple solve(py::handle func, py::handle y0, py::handle t, py::handle rtol, py::handle atol, py::handle method,
                  py::handle options, py::handle args) {
    const bool plain = inspector_.is_tensor(y0) && inspector_.is_tensor(t) && PyFloat_CheckExact(rtol.ptr()) &&
                       PyFloat_CheckExact(atol.ptr()) && (method.is_none() || PyUnicode_CheckExact(method.ptr())) &&
                       is_empty(options) && PyTuple_CheckExact(args.ptr()) && PyTuple_GET_SIZE(args.ptr()) == 0;
    Look state, times;
    if (!plain || !is_func(func) || !called_plainly() || !lies_on_cpu(y0, state) || !lies_on_cpu(t, times))
      return nothing();
    const bool grad = is_true(call(ask_.grad_enabled));
    if (is_true(call_method(y0, PYODE_NAME(is_inference))) ||
        (grad && is_true(attribute(t, PYODE_NAME(requires_grad)))))
      return nothing();
    auto kind = std::make_shared<Kind>();
    kind->dtype = state.dtype;
    kind->shape = std::move(state.shape);
    kind->time_dtype = times.dtype;
    kind->time_shape = std::move(times.shape);
    kind->times.assign(static_cast<const char*>(times.data), static_cast<size_t>(times.bytes));
    kind->method = py::reinterpret_borrow<py::object>(method);
    kind->rtol = PyFloat_AS_DOUBLE(rtol.ptr());
    kind->atol = PyFloat_AS_DOUBLE(atol.ptr());
    kind->threads = integer(call(ask_.threads));
    kind->grad = grad;
    for (size_t i = entries_.size(); i-- > 0;) {
      if (!(*entries_[i].kind == *kind)) continue;
      const Entry found = std::move(entries_[i]);
      entries_.erase(entries_.begin() + static_cast<std::ptrdiff_t>(i));
      if (!py::isinstance<SolveAgain>(found.loop)) return py::make_tuple(py::none(), found.loop, found.kind);
      py::object ys = found.loop.cast<SolveAgain&>()(func, py::reinterpret_borrow<py::object>(y0));
      put(found.kind, found.loop);
      return py::make_tuple(std::move(ys), py::none(), py::none());
    }
    return py::make_tuple(py::none(), py::none(), kind);
  }

  /// Keeps a loop for the next solve of a kind, or a SolveAgain, which solves by its loop itself.
  void put(std::shared_ptr<Kind> kind, py::object loop) {
    if (entries_.size() == most_) entries_.erase(entries_.begin());
    entries_.push_back({std::move(kind), std::move(loop)});
  }

  void clear() { std::vector<Entry>().swap(entries_); }
  size_t size() const { return entries_.size(); }

 private:
  struct Entry {
    std::shared_ptr<Kind> kind;
    py::object loop;
  };

  static py::tuple nothing() { return py::make_tuple(py::none(), py::none(), py::none()); }
  static bool is_true(const py::object& found) { return found.ptr() == Py_True; }
  static py::object call(const py::object& function) { return checked(PyObject_CallNoArgs(function.ptr())); }
  static bool is_empty(py::handle options) {
    return options.is_none() || (PyDict_CheckExact(options.ptr()) && PyDict_GET_SIZE(options.ptr()) == 0);
  }

  /// Whether it is one that is not compiled and that carries no callbacks. A module's search for an attribute that it
  /// lacks takes long, so it isn't asked: only what it and its class have.
  bool is_func(py::handle func) const {
    PyTypeObject* const type = Py_TYPE(func.ptr());
    if (!PyCallable_Check(func.ptr()) ||
        PyType_IsSubtype(type, reinterpret_cast<PyTypeObject*>(ask_.compiled_type.ptr())))
      return false;
    PyObject* const own = PyObject_GenericGetDict(func.ptr(), nullptr);
    if (own == nullptr) PyErr_Clear();
    const py::object attributes = py::reinterpret_steal<py::object>(own);
    for (const py::handle name : ask_.callbacks)
      if ((attributes && PyDict_Contains(attributes.ptr(), name.ptr()) != 0) ||
          _PyType_Lookup(type, name.ptr()) != nullptr)
        return false;
    return true;
  }

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
           integer(attribute(ask_.forward_mode, PYODE_NAME(_current_level))) < 0 && !is_true(call(ask_.inference_mode));
  }

  const Inspector& inspector_;
  const Surroundings ask_;
  const size_t most_;
  std::vector<Entry> entries_;
};

}  // namespace bindings
}  // namespace pyode
