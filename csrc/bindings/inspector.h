// What is to be known of a tensor before its memory is used.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "arrays.h"

namespace pyode {
namespace bindings {

/// What is seen of a tensor.
struct Look {
  void* data = nullptr;
  uint64_t dtype = 0, device = 0;  // each the same number for all tensors that have it
  std::vector<int64_t> shape;
  int64_t bytes = 0;
  bool on_cpu = false, is_contiguous = false;
  bool may_be_lazy = false;  // a conj() or neg view, which of other tensors is not contiguous

  bool is_like(const Look& other) const {
    return dtype == other.dtype && device == other.device && shape == other.shape;
  }
};

/// Looks at tensors: through DLPack's exchange API (version 1.3, by its ABI), which is one call, without a Python
/// object for each answer; of a torch that has none, by attributes.
class Inspector {
 public:
  /// Args:
  ///   type: torch.Tensor.
  ///   exchange: its __dlpack_c_exchange_api__, or None.
  ///   storage_uses: tells how many use a storage of a given address; None where torch doesn't tell.
  ///   unshared: a tensor whose memory nobody else uses.
  Inspector(py::object type, const py::object& exchange, py::object storage_uses, py::handle unshared)
      : type_(std::move(type)), storage_uses_(std::move(storage_uses)) {
    constexpr const char* name = "dlpack_exchange_api";
    if (PyCapsule_IsValid(exchange.ptr(), name)) {
      const Api* const api = static_cast<const Api*>(PyCapsule_GetPointer(exchange.ptr(), name));
      if (api->major == 1) describe_ = api->describe;
    }
    if (!storage_uses_.is_none()) alone_ = uses(unshared, call_method(unshared, PYODE_NAME(untyped_storage)));
  }
  Inspector(const Inspector&) = delete;

  /// Whether an object is a tensor, of no subclass.
  bool is_tensor(py::handle x) const { return reinterpret_cast<PyObject*>(Py_TYPE(x.ptr())) == type_.ptr(); }

  /// Whether a tensor has a memory to be seen; then it is told of.
  bool look(py::handle tensor, Look& look) const {
    return describe_ != nullptr ? describe(tensor, look) : ask(tensor, look);
  }

  /// Whether a tensor is all that uses its memory, which is torch's, and nothing in C++ holds it.
  bool is_unshared(py::handle x) const {
    if (storage_uses_.is_none()) return false;
    const py::object storage = call_method(x, PYODE_NAME(untyped_storage));
    return uses(x, storage) == alone_ && is_true(call_method(storage, PYODE_NAME(resizable)));
  }

 private:
  /// DLPack's DLTensor.
  struct Described {
    void* data;
    int32_t device_type, device_index, dims;
    uint8_t code, bits;
    uint16_t lanes;
    const int64_t *shape, *strides;
    uint64_t offset;
  };
  struct Api {
    uint32_t major, minor;
    const void *previous, *allocate, *give, *take;
    int (*describe)(void* tensor, Described* found);
  };
  static constexpr int32_t kCpu = 1;
  static constexpr uint8_t kComplex = 5;

  bool describe(py::handle tensor, Look& look) const {
    Described found;
    if (describe_(tensor.ptr(), &found) != 0) {
      PyErr_Clear();
      return false;
    }
    look.data = found.data;
    look.dtype = found.code | uint64_t{found.bits} << 8 | uint64_t{found.lanes} << 16;
    look.device = static_cast<uint32_t>(found.device_type) | static_cast<uint64_t>(found.device_index) << 32;
    look.on_cpu = found.device_type == kCpu;
    look.shape.assign(found.shape, found.shape + found.dims);
    look.is_contiguous = true;
    int64_t numel = 1;
    for (int32_t i = found.dims; i-- > 0; numel *= found.shape[i])
      if (found.strides != nullptr && found.shape[i] != 1 && found.strides[i] != numel) look.is_contiguous = false;
    look.bytes = numel * found.bits * found.lanes / 8;
    look.may_be_lazy = found.code == kComplex || numel == 1;
    return found.offset == 0;
  }

  static bool ask(py::handle tensor, Look& look) {
    look.dtype = reinterpret_cast<uintptr_t>(attribute(tensor, PYODE_NAME(dtype)).ptr());
    look.device = static_cast<uint64_t>(PyObject_Hash(attribute(tensor, PYODE_NAME(device)).ptr()));
    look.on_cpu = is_true(attribute(tensor, PYODE_NAME(is_cpu)));
    look.is_contiguous = is_true(call_method(tensor, PYODE_NAME(is_contiguous)));
    look.shape.clear();
    for (const py::handle n : attribute(tensor, PYODE_NAME(shape))) look.shape.push_back(n.cast<int64_t>());
    look.bytes = integer(attribute(tensor, PYODE_NAME(nbytes)));
    look.may_be_lazy =
        is_true(call_method(tensor, PYODE_NAME(is_complex))) || integer(call_method(tensor, PYODE_NAME(numel))) == 1;
    look.data = address(tensor);
    return true;
  }

  std::pair<int64_t, int64_t> uses(py::handle x, const py::object& storage) const {
    return {uses_of(x), uses_of_storage(storage_uses_, attribute(storage, PYODE_NAME(_cdata)))};
  }

  py::object type_, storage_uses_;
  int (*describe_)(void*, Described*) = nullptr;
  std::pair<int64_t, int64_t> alone_;
};

}  // namespace bindings
}  // namespace pyode
