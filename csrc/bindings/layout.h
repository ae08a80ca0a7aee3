// How Python holds a layout, a tableau, and what an op needs of them.
#pragma once

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "../ops.h"
#include "arrays.h"

namespace pyode {
namespace bindings {

/// A Layout with the memory it points to, and with a supply of states.
struct OwnedLayout {
  Layout layout;
  std::vector<int64_t> segments;
  py::object segments_on_device;
  bool cuda;
  mutable Supply states;

  OwnedLayout(int scalar, bool is_complex, int64_t samples, int64_t size, const std::vector<int64_t>& offsets,
              int threads, bool on_cuda, uintptr_t stream, py::object device_offsets, py::object make_state,
              py::object storage_uses)
      : layout{},
        segments(offsets),
        segments_on_device(std::move(device_offsets)),
        cuda(on_cuda),
        states(std::move(make_state), std::move(storage_uses)) {
    layout.scalar = static_cast<Scalar>(scalar);
    layout.is_complex = is_complex;
    layout.samples = samples;
    layout.size = size;
    layout.threads = threads;
    layout.stream = reinterpret_cast<void*>(stream);
    layout.segments = cuda ? address<int64_t>(segments_on_device) : segments.data();
    layout.n_segments = static_cast<int64_t>(segments.size()) - 1;
    for (int64_t s = 0; s < layout.n_segments; ++s)
      if (segments[s + 1] - segments[s] > layout.longest_segment)
        layout.longest_segment = segments[s + 1] - segments[s];
  }
  OwnedLayout(const OwnedLayout&) = delete;

  int64_t error_parts() const {
#if defined(PYODE_CUDA)
    if (cuda) return pyode::cuda::error_parts(layout);
#endif
    return 1;
  }
};

constexpr int64_t kWorthUnlocking = 1 << 15;  // numbers; below, letting go of the GIL costs more than the work

inline void check_launch(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("a CUDA kernel was not launched: ") + error);
}

/// Runs an op on the layout's backend, without the GIL where that pays.
template <class OnCpu, class OnCuda>
void dispatch(const OwnedLayout& where, OnCpu on_cpu, OnCuda on_cuda) {
  if (!where.cuda) {
    if (where.layout.samples * where.layout.size >= kWorthUnlocking) {
      py::gil_scoped_release unlocked;
      on_cpu();
    } else {
      on_cpu();
    }
    return;
  }
  check_launch(on_cuda());
}

#if defined(PYODE_CUDA)
#define PYODE_DISPATCH(where, op_name, op) \
  dispatch(where, [&] { cpu::op_name((where).layout, op); }, [&] { return cuda::op_name((where).layout, op); })
#else
#define PYODE_DISPATCH(where, op_name, op)              \
  dispatch(                                             \
      where, [&] { cpu::op_name((where).layout, op); }, \
      []() -> const char* { return "pyode was built without CUDA"; })
#endif

/// The weights other than zero, and whose they are.
struct Weights {
  int terms = 0;
  int at[kMaxStages] = {};
  double w[kMaxStages] = {};

  explicit Weights(const py::tuple& weights) {
    if (weights.size() > kMaxStages) throw py::value_error("stage weights: there are too many");
    for (size_t j = 0; j < weights.size(); ++j) {
      const double weight = PyFloat_AsDouble(PyTuple_GET_ITEM(weights.ptr(), static_cast<Py_ssize_t>(j)));
      if (weight == 0) continue;
      at[terms] = static_cast<int>(j);
      w[terms++] = weight;
    }
    if (PyErr_Occurred()) throw py::error_already_set();
  }

  /// Puts the terms into an op; `address_of(j)` is the address of the j-th derivative.
  template <class Op, class AddressOf>
  void fill(Op& op, AddressOf address_of) const {
    op.terms = terms;
    for (int i = 0; i < terms; ++i) {
      op.w[i] = w[i];
      op.k[i] = address_of(at[i]);
    }
  }
};

/// The address of the j-th derivative of a list.
inline const void* derivative(const py::list& ks, int j) {
  if (static_cast<size_t>(j) >= ks.size()) throw py::value_error("stage weights: there are more than derivatives");
  const py::handle array = PyList_GET_ITEM(ks.ptr(), j);
  if (array.is_none()) throw py::value_error("a derivative with a weight is missing");
  return address(array);
}

/// A method: its weights for every stage after the first, for the step, and for the error estimate.
struct Table {
  std::vector<Weights> rows;
  Weights weights, error;

  Table(const py::tuple& all_rows, const py::tuple& step_weights, const py::tuple& error_weights)
      : weights(step_weights), error(error_weights) {
    if (all_rows.size() >= kMaxStages) throw py::value_error("table: there are too many stages");
    for (py::handle row : all_rows) rows.emplace_back(py::reinterpret_borrow<py::tuple>(row));
  }
};

/// A tolerance is a number, or a tensor with one for every number of the state; on CUDA also a tensor of one for all.
inline void read_tolerances(py::handle rtol, py::handle atol, ErrorNorm& op) {
  const auto read = [](py::handle tolerance, double& value, const double*& each, int64_t& stride) {
    each = nullptr;
    value = 0;
    if (PyFloat_Check(tolerance.ptr())) {
      value = PyFloat_AsDouble(tolerance.ptr());
    } else {
      each = address<const double>(tolerance);
      stride = integer(call_method(tolerance, PYODE_NAME(dim))) != 0;
    }
  };
  read(rtol, op.rtol, op.rtol_each, op.rtol_stride);
  read(atol, op.atol, op.atol_each, op.atol_stride);
}

}  // namespace bindings
}  // namespace pyode
