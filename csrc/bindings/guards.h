// Whether what a trace has relied on is still as it was.
#pragma once

#include <vector>

#include "inspector.h"

namespace pyode {
namespace bindings {

/// Objects that must stay in their places, and containers that must stay equal to copies of them.
class Guards {
 public:
  /// Args:
  ///   items: of (container, key, object).
  ///   cells: of (closure's cell, object).
  ///   functions: of (function, code, defaults, defaults of keywords).
  ///   containers: of (container, copy).
  Guards(py::list items, py::list cells, py::list functions, py::list containers)
      : items_(std::move(items)),
        cells_(std::move(cells)),
        functions_(std::move(functions)),
        containers_(std::move(containers)) {}
  Guards(const Guards&) = delete;

  /// Whether nothing has changed. Of a container that differs from its copy, `altered(container, copy)` decides whether
  /// that counts.
  bool hold(const py::object& altered) const {
    try {
      for (const py::handle place : items_)
        if (!is_item(part(place, 0), part(place, 1), part(place, 2))) return false;
      for (const py::handle place : cells_)
        if (PyCell_GET(part(place, 0)) != part(place, 1)) return false;
      for (const py::handle place : functions_)
        if (!is_function(part(place, 0), part(place, 1), part(place, 2), part(place, 3))) return false;
      for (const py::handle place : containers_) {
        if (are_identical(part(place, 0), part(place, 1))) continue;
        const int same = PyObject_RichCompareBool(part(place, 0), part(place, 1), Py_EQ);
        if (same < 0) throw py::error_already_set();
        if (same == 0 && is_true(altered(py::handle(part(place, 0)), py::handle(part(place, 1))))) return false;
      }
    } catch (const py::error_already_set& error) {  // it is gone, or tensors were compared
      for (PyObject* expected : {PyExc_KeyError, PyExc_IndexError, PyExc_RuntimeError, PyExc_ValueError})
        if (error.matches(expected)) return false;
      throw;
    }
    return true;
  }

 private:
  static PyObject* part(py::handle place, Py_ssize_t i) { return PyTuple_GET_ITEM(place.ptr(), i); }

  static bool is_item(PyObject* container, PyObject* key, PyObject* object) {
    if (PyDict_CheckExact(container)) {
      PyObject* const found = PyDict_GetItemWithError(container, key);
      if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
      return found == object;
    }
    return checked(PyObject_GetItem(container, key)).ptr() == object;
  }

  /// Whether two containers hold the same objects in the same order, or nothing; soon told, of most modules' hooks.
  static bool are_identical(PyObject* a, PyObject* b) {
    if (PyAnySet_Check(a) && PyAnySet_Check(b)) return PySet_GET_SIZE(a) == 0 && PySet_GET_SIZE(b) == 0;
    if (!PyDict_Check(a) || !PyDict_Check(b) || PyDict_GET_SIZE(a) != PyDict_GET_SIZE(b)) return false;
    PyObject *key_a, *value_a, *key_b, *value_b;
    Py_ssize_t at_a = 0, at_b = 0;
    while (PyDict_Next(a, &at_a, &key_a, &value_a))
      if (!PyDict_Next(b, &at_b, &key_b, &value_b) || key_a != key_b || value_a != value_b) return false;
    return true;
  }

  static bool is_function(PyObject* function, PyObject* code, PyObject* defaults, PyObject* keywords) {
    const auto is = [](PyObject* now, PyObject* then) { return (now == nullptr ? Py_None : now) == then; };
    return PyFunction_GET_CODE(function) == code && is(PyFunction_GET_DEFAULTS(function), defaults) &&
           is(PyFunction_GET_KW_DEFAULTS(function), keywords);
  }

  const py::list items_, cells_, functions_, containers_;
};

/// Tensors that must keep their shapes, dtypes and devices.
class Forms {
 public:
  Forms(const Inspector& inspector, py::list tensors) : inspector_(inspector), tensors_(std::move(tensors)) {
    for (const py::handle x : tensors_) looks_.push_back(look(x));
  }
  Forms(const Forms&) = delete;

  bool hold() const {
    size_t i = 0;
    for (const py::handle x : tensors_)
      if (!look(x).is_like(looks_[i++])) return false;
    return true;
  }

 private:
  Look look(py::handle x) const {
    Look found;
    inspector_.look(x, found);
    return found;
  }

  const Inspector& inspector_;
  const py::list tensors_;
  std::vector<Look> looks_;
};

}  // namespace bindings
}  // namespace pyode
