// What DLPack's exchange API (version 1.3, by its ABI) tells of a tensor: in one call, without a Python object for each
// answer.
#pragma once

#include "arrays.h"

namespace pyode {
namespace bindings {

/// A tensor that somebody else keeps alive; DLPack's DLTensor.
struct Described {
  void* data;
  struct Device {
    int32_t type, index;
    bool operator==(const Device& other) const { return type == other.type && index == other.index; }
  } device;
  int32_t dims;
  struct Dtype {
    uint8_t code, bits;
    uint16_t lanes;
    bool operator==(const Dtype& other) const {
      return code == other.code && bits == other.bits && lanes == other.lanes;
    }
  } dtype;
  const int64_t *shape, *strides;
  uint64_t offset;

  bool is_contiguous() const {
    if (strides == nullptr) return true;
    int64_t stride = 1;
    for (int32_t i = dims; i-- > 0; stride *= shape[i])
      if (shape[i] != 1 && strides[i] != stride) return false;
    return true;
  }
};

/// The functions of a tensor type, or none.
class Exchange {
 public:
  /// Args: the type's __dlpack_c_exchange_api__, or None.
  explicit Exchange(py::handle capsule) {
    constexpr const char* name = "dlpack_exchange_api";
    if (!PyCapsule_IsValid(capsule.ptr(), name)) return;
    const Api* const api = static_cast<const Api*>(PyCapsule_GetPointer(capsule.ptr(), name));
    if (api->major == 1) describe_ = api->describe;
  }

  explicit operator bool() const { return describe_ != nullptr; }

  /// Whether a tensor of the type can be told of.
  bool describe(py::handle tensor, Described& found) const {
    if (describe_(tensor.ptr(), &found) == 0) return found.offset == 0;
    PyErr_Clear();
    return false;
  }

 private:
  struct Api {
    uint32_t major, minor;
    const void *previous, *allocate, *give, *take;
    int (*describe)(void* tensor, Described* found);
  };

  int (*describe_)(void*, Described*) = nullptr;
};

}  // namespace bindings
}  // namespace pyode
