// The compiled module. It knows Python and nothing of torch: an array is an address or an object with a data_ptr()
// method, and shapes, dtypes and devices are the caller's business (pyode/_ops/native.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/parallel.h"
#include "ops.h"

#define PYODE_STRINGIFY_(x) #x
#define PYODE_STRINGIFY(x) PYODE_STRINGIFY_(x)

namespace py = pybind11;
using namespace pyode;

namespace {

constexpr int64_t kWorthUnlocking = 1 << 15;  // numbers; below, letting go of the GIL costs more than the work

PyObject* const kDataPtr = PyUnicode_InternFromString("data_ptr");

template <class T = void>
T* address(py::handle tensor) {
  if (tensor.is_none()) return nullptr;
  if (PyLong_Check(tensor.ptr())) return static_cast<T*>(PyLong_AsVoidPtr(tensor.ptr()));
  PyObject* const number = PyObject_CallMethodNoArgs(tensor.ptr(), kDataPtr);
  if (number == nullptr) throw py::error_already_set();
  void* const pointer = PyLong_AsVoidPtr(number);
  Py_DECREF(number);
  if (pointer == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return static_cast<T*>(pointer);
}

/// Addresses of the arrays seen last, one for each role. Asking a tensor takes as long as a small op does, and the
/// derivatives of a step are handed over again and again. An array is kept alive while its address is; so it is not for
/// tensors with a graph behind them, which holds on to the layout: nobody would see that circle.
class AddressCache {
 public:
  explicit AddressCache(bool enabled) : enabled_(enabled) {}
  AddressCache(const AddressCache&) = delete;
  ~AddressCache() {
    for (Entry& entry : entries_) Py_XDECREF(entry.object);
  }

  void* of(int role, py::handle array) {
    if (!enabled_) return address(array);
    Entry& entry = entries_[role];
    if (entry.object != array.ptr()) {
      entry.address = address(array);
      Py_XDECREF(entry.object);
      entry.object = array.inc_ref().ptr();
    }
    return entry.address;
  }

 private:
  struct Entry {
    PyObject* object = nullptr;
    void* address = nullptr;
  };
  bool enabled_;
  Entry entries_[kMaxStages + 2];
};
constexpr int kRoleY = kMaxStages, kRoleDt = kMaxStages + 1;  // the others are the derivatives'

/// A Layout with the memory it points to.
struct OwnedLayout {
  mutable AddressCache addresses;
  Layout layout;
  std::vector<int64_t> segments;
  py::object segments_on_device;
  bool cuda;

  OwnedLayout(int scalar, bool is_complex, int64_t samples, int64_t size, const std::vector<int64_t>& offsets,
              int threads, bool on_cuda, uintptr_t stream, py::object device_offsets, bool caches)
      : addresses(caches), layout{}, segments(offsets), segments_on_device(std::move(device_offsets)), cuda(on_cuda) {
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
    if (cuda) return cuda::error_parts(layout);
#endif
    return 1;
  }
};

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
  if (const char* error = on_cuda()) throw std::runtime_error(std::string("a CUDA kernel was not launched: ") + error);
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

/// The terms with a weight other than zero: k and w filled, their number returned. `address_of(j, array)` looks up.
template <class AddressOf>
int read_terms(const py::tuple& weights, const py::list& ks, const void** k, double* w, AddressOf address_of) {
  if (weights.size() > ks.size() || weights.size() > kMaxStages)
    throw py::value_error("stage weights: there are more than derivatives");
  int n = 0;
  for (size_t j = 0; j < weights.size(); ++j) {
    const double weight = PyFloat_AsDouble(PyTuple_GET_ITEM(weights.ptr(), j));
    if (weight == 0) continue;
    const py::handle array = PyList_GET_ITEM(ks.ptr(), j);
    if (array.is_none()) throw py::value_error("a derivative with a weight is missing");
    w[n] = weight;
    k[n++] = address_of(static_cast<int>(j), array);
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  return n;
}

void stage_combine(const OwnedLayout& where, const py::tuple& weights, py::handle y, const py::list& ks, py::handle dt,
                   py::handle out) {
  AddressCache& cache = where.addresses;
  StageCombine op;
  op.terms = read_terms(weights, ks, op.k, op.w, [&](int j, py::handle k) { return cache.of(j, k); });
  op.y = cache.of(kRoleY, y);
  op.dt = static_cast<const double*>(cache.of(kRoleDt, dt));
  op.out = address(out);
  PYODE_DISPATCH(where, stage_combine, op);
}

py::object checked(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

/// What func has to return for a stage to go on without a look from Python, and func itself (pyode/state.py).
struct Expected {
  py::object func, type, dtype, shape, device;
  bool watch;  // whether the version of func's input is to stay 0

  bool fits(py::handle k, py::handle y) const {
    static PyObject* const names[] = {PyUnicode_InternFromString("dtype"), PyUnicode_InternFromString("shape"),
                                      PyUnicode_InternFromString("device"), PyUnicode_InternFromString("is_contiguous"),
                                      PyUnicode_InternFromString("_version")};
    const auto get = [](py::handle object, PyObject* name) { return checked(PyObject_GetAttr(object.ptr(), name)); };
    const auto equal = [](const py::object& a, const py::object& b) {
      return a.is(b) || PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ) == 1;
    };
    return reinterpret_cast<PyObject*>(Py_TYPE(k.ptr())) == type.ptr() && get(k, names[0]).is(dtype) &&
           equal(get(k, names[1]), shape) && equal(get(k, names[2]), device) &&
           checked(PyObject_CallMethodNoArgs(k.ptr(), names[3])).ptr() == Py_True &&
           (!watch || PyLong_AsLong(get(y, names[4]).ptr()) == 0);
  }
};

/// All evaluations of a step after its first: for every row a state, allocated by `allocate(y)`, and its derivative,
/// put into ks. Returns the last state. Where `direct` is given, func is called without a detour through `dynamics`,
/// which is only asked to accept what is not as expected.
py::object stages(const OwnedLayout& where, const py::tuple& rows, const py::object& y, const py::list& ks,
                  py::handle dt, const py::tuple& times, const py::object& dynamics, const py::object& allocate,
                  py::handle direct) {
  static PyObject* const accept = PyUnicode_InternFromString("accept");
  Expected want = {};
  if (!direct.is_none()) {
    const auto parts = py::reinterpret_borrow<py::tuple>(direct);
    want = {parts[0], parts[1], parts[2], parts[3], parts[4], parts[5].cast<bool>()};
  }
  if (times.size() > rows.size() || ks.size() < times.size() + 1)
    throw py::value_error("stages: there are more times than rows, or too few places for derivatives");
  py::object state = y;
  for (size_t j = 0; j < times.size(); ++j) {
    state = checked(PyObject_CallOneArg(allocate.ptr(), y.ptr()));
    stage_combine(where, py::reinterpret_borrow<py::tuple>(PyTuple_GET_ITEM(rows.ptr(), j)), y, ks, dt, state);
    PyObject* arguments[] = {PyTuple_GET_ITEM(times.ptr(), j), state.ptr()};
    py::object k;
    if (direct.is_none()) {
      k = checked(PyObject_Vectorcall(dynamics.ptr(), arguments, 2, nullptr));
    } else {
      k = checked(PyObject_Vectorcall(want.func.ptr(), arguments, 2, nullptr));
      if (!want.fits(k, state))
        k = checked(PyObject_CallMethodObjArgs(dynamics.ptr(), accept, k.ptr(), state.ptr(), nullptr));
    }
    if (PyList_SetItem(ks.ptr(), static_cast<Py_ssize_t>(j) + 1, k.release().ptr()) != 0) throw py::error_already_set();
  }
  return state;
}

void stage_vjp(const OwnedLayout& where, const py::tuple& weights, py::handle g, py::handle dt, const py::list& outs) {
  StageVjp op;
  const void* out[kMaxStages];
  op.terms = read_terms(weights, outs, out, op.w, [](int, py::handle array) { return address(array); });
  for (int j = 0; j < op.terms; ++j) op.out[j] = const_cast<void*>(out[j]);
  op.g = address(g);
  op.dt = address<double>(dt);
  PYODE_DISPATCH(where, stage_vjp, op);
}

/// A tolerance is a number, or a tensor with one for every number of the state.
void read_tolerance(py::handle tolerance, double* value, const double** each) {
  *each = nullptr;
  *value = 0;
  if (PyFloat_Check(tolerance.ptr())) {
    *value = PyFloat_AsDouble(tolerance.ptr());
  } else {
    *each = address<const double>(tolerance);
  }
}

void error_norm(const OwnedLayout& where, const py::tuple& weights, py::handle y0, py::handle y1, const py::list& ks,
                py::handle dt, py::handle rtol, py::handle atol, py::handle means, int64_t parts) {
  AddressCache& cache = where.addresses;
  ErrorNorm op;
  op.terms = read_terms(weights, ks, op.k, op.w, [&](int j, py::handle k) { return cache.of(j, k); });
  op.y0 = cache.of(kRoleY, y0);
  op.y1 = address(y1);
  op.dt = address<double>(dt);
  read_tolerance(rtol, &op.rtol, &op.rtol_each);
  read_tolerance(atol, &op.atol, &op.atol_each);
  op.means = address<double>(means);
  op.parts = parts;
  PYODE_DISPATCH(where, error_norm, op);
}

void select_rows(const OwnedLayout& where, py::handle moved, py::handle stayed, py::handle accepted, py::handle out) {
  const SelectRows op = {address(moved), address(stayed), address<int64_t>(accepted), address(out)};
  PYODE_DISPATCH(where, select_rows, op);
}

/// A Control with all that stays the same through a solve.
struct Controller {
  const OwnedLayout& where;
  Control op = {};

  Controller(const OwnedLayout& layout, Scalar time_scalar, py::handle state, int64_t stride, py::handle flags,
             const py::tuple& abscissae)
      : where(layout) {
    op.state = {address<double>(state), layout.layout.samples, stride};
    op.flags = address<int64_t>(flags);
    op.time_scalar = time_scalar;
    if (abscissae.size() > kMaxStages) throw py::value_error("abscissae: there are more than stages");
    op.n_times = static_cast<int>(abscissae.size());
    for (int i = 0; i < op.n_times; ++i) op.c[i] = abscissae[i].cast<double>();
  }

  void set_policy(double safety, double ifactor, double dfactor, double min_step, double max_step, double order,
                  const std::array<double, 3>& beta, const std::array<double, 2>& alpha, double least_ulps,
                  bool cautious, int64_t max_num_steps, bool clip, bool count_per_output, bool resume) {
    op.policy = {safety,
                 ifactor,
                 dfactor,
                 min_step,
                 max_step,
                 order,
                 {beta[0], beta[1], beta[2]},
                 {alpha[0], alpha[1]},
                 least_ulps,
                 cautious,
                 max_num_steps,
                 clip,
                 count_per_output,
                 resume};
  }

  void set_grid(py::handle times, int64_t n_times, bool per_sample, py::handle step_t, int64_t n_step_t,
                py::handle jump_t, int64_t n_jump_t, bool jumps_per_sample) {
    const int64_t B = op.state.samples;
    op.grid = {address<double>(times),   n_times,
               per_sample ? B : 1,       per_sample ? 1 : 0,
               address<double>(step_t),  n_step_t,
               address<double>(jump_t),  n_jump_t,
               jumps_per_sample ? B : 1, jumps_per_sample ? 1 : 0};
  }

  void set_norm(py::handle means, int64_t n_segments, int64_t parts) {
    op.means = address<double>(means);
    op.n_segments = n_segments;
    op.parts = parts;
  }

  /// The flags; on CUDA they are still on the device, and -1 is returned.
  int64_t run(int phase, py::handle stage_times, double first_step) {
    op.phase = static_cast<Phase>(phase);
    op.stage_times = address(stage_times);
    op.first_step = first_step;
    op.turn = 1 - op.turn;
    PYODE_DISPATCH(where, control, op);
    return where.cuda ? -1 : op.flags[op.turn];
  }
};

/// A tableau's interpolant: for each stage the coefficients of x, x^2, ... and the weight at x = 1.
struct Interpolant {
  std::vector<int> stages;
  Interpolate op = {};

  Interpolant(const py::tuple& coefficients, const py::tuple& end) {
    for (size_t j = 0; j < coefficients.size(); ++j) {
      const auto row = coefficients[j].cast<py::tuple>();
      if (row.size() > kMaxDegree || coefficients.size() > kMaxStages || end.size() != coefficients.size())
        throw py::value_error("interpolant: too many stages or too high a degree");
      bool empty = true;
      for (size_t p = 0; p < row.size(); ++p) empty = empty && row[p].cast<double>() == 0;
      if (empty) continue;
      for (size_t p = 0; p < row.size(); ++p) op.c[op.terms][p] = row[p].cast<double>();
      op.end[op.terms++] = end[j].cast<double>();
      op.degree = static_cast<int>(row.size());
      stages.push_back(static_cast<int>(j));
    }
  }
};

void interpolate(const OwnedLayout& where, const Interpolant& interpolant, const Controller& controller, py::handle y,
                 const py::list& ks, py::handle out, int64_t out_stride) {
  Interpolate op = interpolant.op;
  for (int j = 0; j < op.terms; ++j) op.k[j] = address(ks[interpolant.stages[j]]);
  op.y = address(y);
  op.state = controller.op.state;
  op.grid = controller.op.grid;
  op.out = address(out);
  op.out_stride = out_stride;
  PYODE_DISPATCH(where, interpolate, op);
}

// What a signal's handler has raised while a long call without the GIL was under way.
thread_local std::optional<py::error_already_set> interruption;

/// Runs the handlers of signals that have arrived; whether one of them raised.
int interrupted() {
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() == 0) return 0;
  interruption.emplace();
  return 1;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "pyode's compiled ops; see csrc/ops.h";
  m.attr("MAX_STAGES") = kMaxStages;
  m.attr("MAX_DEGREE") = kMaxDegree;
  m.attr("STATE_WORDS") = kWords;
  // For code that is compiled at run time.
  m.attr("RUN_PARALLEL") = reinterpret_cast<uintptr_t>(&cpu::run_parallel);
  m.attr("INTERRUPTED") = reinterpret_cast<uintptr_t>(&interrupted);
  m.def("raise_interruption", [] {
    py::error_already_set error = *std::exchange(interruption, std::nullopt);
    throw error;
  });
  m.attr("COMPILER") = PYODE_COMPILER;
#if defined(PYODE_CUDA)
  m.attr("CUDA") = PYODE_STRINGIFY(PYODE_CUDA);
#else
  m.attr("CUDA") = py::none();
#endif
  m.def("simd_level", &cpu::simd_level);
  py::class_<OwnedLayout>(m, "Layout")
      .def(py::init<int, bool, int64_t, int64_t, const std::vector<int64_t>&, int, bool, uintptr_t, py::object, bool>())
      .def_property_readonly("error_parts", &OwnedLayout::error_parts);
  py::class_<Controller>(m, "Controller")
      .def(py::init([](const OwnedLayout& layout, int time_scalar, py::handle state, int64_t stride, py::handle flags,
                       const py::tuple& c) {
             return new Controller(layout, static_cast<Scalar>(time_scalar), state, stride, flags, c);
           }),
           py::keep_alive<1, 2>())
      .def("set_policy", &Controller::set_policy)
      .def("set_grid", &Controller::set_grid)
      .def("set_norm", &Controller::set_norm)
      .def("run", &Controller::run)
      .def_property_readonly("turn", [](const Controller& self) { return self.op.turn; });
  py::class_<Interpolant>(m, "Interpolant").def(py::init<const py::tuple&, const py::tuple&>());
  m.def("stage_combine", &stage_combine);
  m.def("stages", &stages);
  m.def("stage_vjp", &stage_vjp);
  m.def("error_norm", &error_norm);
  m.def("interpolate", &interpolate);
  m.def("select_rows", &select_rows);
}
