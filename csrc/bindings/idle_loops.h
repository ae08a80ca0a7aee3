// The loops that solves have left, for others of their kinds.
#pragma once

#include <memory>
#include <vector>

#include "kinds.h"
#include "steps.h"

namespace pyode {
namespace bindings {

/// Loops of adaptive and of fixed steps that nobody uses, the least recently used first. Each thread has its own; one
/// at work is not among them, as func may solve, too.
class IdleLoops {
 public:
  /// Args:
  ///   callbacks: names of attributes that a func must not have.
  ///   inference_mode: whether that is on; called without arguments.
  ///   most: so many loops.
  IdleLoops(const Kinds& kinds, py::tuple callbacks, py::object inference_mode, size_t most)
      : kinds_(kinds), callbacks_(std::move(callbacks)), inference_mode_(std::move(inference_mode)), most_(most) {}
  IdleLoops(const IdleLoops&) = delete;

  /// Args: those of odeint; func is not compiled. Returns what such a solve gives, where a SolveAgain serves; or a loop
  /// for it, or None; and the solve's kind, or None if there is to be no loop.
  py::tuple solve(py::handle func, py::handle y0, py::handle t, py::handle rtol, py::handle atol, py::handle method,
                  py::handle options, py::handle args) {
    const bool plain = (method.is_none() || PyUnicode_CheckExact(method.ptr())) && is_empty(options) &&
                       PyTuple_CheckExact(args.ptr()) && PyTuple_GET_SIZE(args.ptr()) == 0 && is_func(func);
    auto kind = plain ? kinds_.of(y0, t, rtol, atol, py::reinterpret_borrow<py::object>(method)) : nullptr;
    if (kind == nullptr || kind->time_grad || is_true(call(inference_mode_)) ||
        is_true(call_method(y0, PYODE_NAME(is_inference))))
      return py::make_tuple(py::none(), py::none(), py::none());
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

  static bool is_empty(py::handle options) {
    return options.is_none() || (PyDict_CheckExact(options.ptr()) && PyDict_GET_SIZE(options.ptr()) == 0);
  }

  /// Whether it is one that carries no callbacks. A module's search for an attribute that it lacks takes long, so it
  /// isn't asked: only what it and its class have.
  bool is_func(py::handle func) const {
    if (!PyCallable_Check(func.ptr())) return false;
    PyObject* const own = PyObject_GenericGetDict(func.ptr(), nullptr);
    if (own == nullptr) PyErr_Clear();
    const py::object attributes = py::reinterpret_steal<py::object>(own);
    for (const py::handle name : callbacks_)
      if ((attributes && PyDict_Contains(attributes.ptr(), name.ptr()) != 0) ||
          _PyType_Lookup(Py_TYPE(func.ptr()), name.ptr()) != nullptr)
        return false;
    return true;
  }

  const Kinds& kinds_;
  const py::tuple callbacks_;
  const py::object inference_mode_;
  const size_t most_;
  std::vector<Entry> entries_;
};

}  // namespace bindings
}  // namespace pyode
