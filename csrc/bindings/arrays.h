// Arrays as Python hands them over: an address, or an object with a data_ptr() method; and memory for new ones.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

/// An attribute's name as a Python string, made once.
#define PYODE_NAME(name)                                                 \
  ([] {                                                                  \
    static PyObject* const interned = PyUnicode_InternFromString(#name); \
    return interned;                                                     \
  }())

namespace pyode {
namespace bindings {

namespace py = pybind11;

inline py::object checked(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline py::object attribute(py::handle object, PyObject* name) { return checked(PyObject_GetAttr(object.ptr(), name)); }

inline py::object call_method(py::handle object, PyObject* name) {
  return checked(PyObject_CallMethodNoArgs(object.ptr(), name));
}

inline int64_t integer(const py::object& number) {
  const int64_t value = PyLong_AsLongLong(number.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline py::object call(const py::object& function) { return checked(PyObject_CallNoArgs(function.ptr())); }

inline bool is_true(const py::object& found) { return found.ptr() == Py_True; }

/// Whether a == b; not if they can't be compared.
inline bool equal(const py::object& a, const py::object& b) {
  const int same = PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ);
  if (same < 0) PyErr_Clear();
  return same == 1;
}

template <class T = void>
T* address(py::handle array) {
  if (array.is_none()) return nullptr;
  const auto read = [](py::handle number) {
    void* const pointer = PyLong_AsVoidPtr(number.ptr());
    if (pointer == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return static_cast<T*>(pointer);
  };
  return PyLong_Check(array.ptr()) ? read(array) : read(call_method(array, PYODE_NAME(data_ptr)));
}

/// How many hold on to a tensor in C++, and by another tensor or alone to a storage, whose address is given.
inline int64_t uses_of(py::handle tensor) { return integer(call_method(tensor, PYODE_NAME(_use_count))); }
inline int64_t uses_of_storage(const py::object& storage_uses, const py::object& address) {
  return integer(checked(PyObject_CallOneArg(storage_uses.ptr(), address.ptr())));
}

/// Tensors that are made alike, again and again. One whose last user has gone is given out again: a new small tensor
/// costs as much as an op on it, and the old one's memory is in the cache.
class Supply {
 public:
  /// A tensor, or several that share one memory: the whole, and views of it.
  struct Item {
    py::tuple tensors;
    void* data = nullptr;                 // the whole's
    py::object storage, storage_address;  // that memory, kept alive, and its address for storage_uses
    std::vector<int64_t> uses;            // of each tensor, and of the storage, when nobody else has them
    py::handle whole() const { return PyTuple_GET_ITEM(tensors.ptr(), 0); }
    py::handle view(size_t i) const { return PyTuple_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i) + 1); }
  };

  /// Args:
  ///   make: returns a new tensor like its argument, or a tuple of the whole and its views.
  ///   storage_uses: tells how many use a storage of a given address; None if none is to be given out again.
  Supply(py::object make, py::object storage_uses) : make_(std::move(make)), storage_uses_(std::move(storage_uses)) {}
  Supply(const Supply&) = delete;

  /// One that nobody else holds on to: in Python, in C++, or to its memory through another tensor. Valid until the
  /// next.
  const Item& take(py::handle like) {
    const size_t n = items_.size();
    for (size_t i = 0; i < n && !storage_uses_.is_none(); ++i) {
      const size_t at = (last_ + i) % n;  // the last one has mostly served, and is in the cache
      if (is_free(items_[at])) return items_[last_ = at];
    }
    if (storage_uses_.is_none() || n == kMost) items_.erase(items_.begin(), items_.begin() + (n > 0));
    items_.push_back(made(like));
    return items_[last_ = items_.size() - 1];
  }

  /// The one taken last.
  const Item& last() const { return items_[last_]; }

 private:
  static constexpr size_t kMost = 4;  // a step's ends, and stages' states that a func has not let go of yet

  Item made(py::handle like) const {
    Item item;
    py::object found = checked(PyObject_CallOneArg(make_.ptr(), like.ptr()));
    item.tensors = PyTuple_Check(found.ptr()) ? py::reinterpret_borrow<py::tuple>(found) : py::make_tuple(found);
    found = py::object();
    item.data = address(item.whole());
    if (storage_uses_.is_none()) return item;
    item.storage = call_method(item.whole(), PYODE_NAME(untyped_storage));
    item.storage_address = attribute(item.storage, PYODE_NAME(_cdata));
    for (py::handle tensor : item.tensors) item.uses.push_back(all_uses_of(tensor));
    item.uses.push_back(uses_of_storage(storage_uses_, item.storage_address));
    return item;
  }

  bool is_free(const Item& item) const {
    size_t i = 0;
    for (py::handle tensor : item.tensors)
      if (all_uses_of(tensor) != item.uses[i++] || attribute(tensor, PYODE_NAME(requires_grad)).ptr() != Py_False)
        return false;
    const py::handle whole = item.whole();
    return uses_of_storage(storage_uses_, item.storage_address) == item.uses[i] && address(whole) == item.data &&
           integer(attribute(whole, PYODE_NAME(_version))) == 0;
  }

  static int64_t all_uses_of(py::handle tensor) { return Py_REFCNT(tensor.ptr()) + uses_of(tensor); }

  py::object make_, storage_uses_;
  std::vector<Item> items_;
  size_t last_ = 0;
};

}  // namespace bindings
}  // namespace pyode
