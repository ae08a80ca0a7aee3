// The compiled module. It knows Python and nothing of torch: shapes, dtypes and devices are the caller's business
// (pyode/_ops/native.py).
#include <memory>

#include "../cpu/pages.h"
#include "../cpu/parallel.h"
#include "compiled.h"
#include "grid.h"
#include "guards.h"
#include "idle_loops.h"
#if defined(PYODE_CUDA)
#include "../cuda/graph_loop.h"
#endif

#define PYODE_STRINGIFY_(x) #x
#define PYODE_STRINGIFY(x) PYODE_STRINGIFY_(x)

using namespace pyode;
using namespace pyode::bindings;

namespace {

void stage_combine(const OwnedLayout& where, const py::tuple& weights, py::handle y, const py::list& ks, py::handle dt,
                   py::handle out) {
  StageCombine op;
  Weights(weights).fill(op, [&](int j) { return derivative(ks, j); });
  op.y = address(y);
  op.dt = address<double>(dt);
  op.out = address(out);
  PYODE_DISPATCH(where, stage_combine, op);
}

void stage_vjp(const OwnedLayout& where, const py::tuple& weights, py::handle g, py::handle dt, const py::list& outs) {
  StageVjp op;
  const Weights some(weights);
  op.terms = some.terms;
  for (int i = 0; i < some.terms; ++i) {
    op.w[i] = some.w[i];
    op.out[i] = const_cast<void*>(derivative(outs, some.at[i]));
  }
  op.g = address(g);
  op.dt = address<double>(dt);
  PYODE_DISPATCH(where, stage_vjp, op);
}

void error_norm(const OwnedLayout& where, const py::tuple& weights, py::handle y0, py::handle y1, const py::list& ks,
                py::handle dt, py::handle rtol, py::handle atol, py::handle means, int64_t parts) {
  ErrorNorm op;
  Weights(weights).fill(op, [&](int j) { return derivative(ks, j); });
  op.y0 = address(y0);
  op.y1 = address(y1);
  op.dt = address<double>(dt);
  read_tolerances(rtol, atol, op);
  op.means = address<double>(means);
  op.parts = parts;
  PYODE_DISPATCH(where, error_norm, op);
}

/// Leaves f and -g, states of this layout, one behind the other in `out`, the second at `offset` bytes. `one` is a 1.
void opposites(const OwnedLayout& where, py::handle f, py::handle g, py::handle one, py::handle out, int64_t offset) {
  StageCombine first;
  first.terms = 0;
  first.y = address(f);
  first.dt = nullptr;
  first.out = address(out);
  StageVjp second;
  second.terms = 1;
  second.w[0] = -1;
  second.g = address(g);
  second.dt = address<double>(one);
  second.out[0] = static_cast<char*>(first.out) + offset;
  PYODE_DISPATCH(where, stage_combine, first);
  PYODE_DISPATCH(where, stage_vjp, second);
}

void select_rows(const OwnedLayout& where, py::handle moved, py::handle stayed, py::handle accepted, py::handle out) {
  const SelectRows op = {address(moved), address(stayed), address<int64_t>(accepted), address(out)};
  PYODE_DISPATCH(where, select_rows, op);
}

Interpolate outputs_of(const Interpolant& interpolant, const Controller& controller, py::handle y, const py::list& ks,
                       py::handle out, int64_t out_stride) {
  Interpolate op = interpolant.op;
  for (int j = 0; j < op.terms; ++j) op.k[j] = address(ks[interpolant.stages[j]]);
  op.y = address(y);
  op.state = controller.op.state;
  op.grid = controller.op.grid;
  op.out = address(out);
  op.out_stride = out_stride;
  return op;
}

void interpolate(const OwnedLayout& where, const Interpolant& interpolant, const Controller& controller, py::handle y,
                 const py::list& ks, py::handle out, int64_t out_stride) {
  const Interpolate op = outputs_of(interpolant, controller, y, ks, out, out_stride);
  PYODE_DISPATCH(where, interpolate, op);
}

#if defined(PYODE_CUDA)
FinishStep finish_of(const Interpolant& interpolant, const Controller& controller, py::handle y, const py::list& ks,
                     py::handle y1, py::handle out, int64_t out_stride, py::handle stage, double w) {
  return {outputs_of(interpolant, controller, y, ks, out, out_stride),
          address(y),
          address(ks[0]),
          address(y1),
          address(ks[ks.size() - 1]),
          address(stage),
          w};
}

void finish_step(const OwnedLayout& where, const Interpolant& interpolant, const Controller& controller, py::handle y,
                 const py::list& ks, py::handle y1, py::handle out, int64_t out_stride, py::handle stage, double w) {
  check_launch(
      pyode::cuda::finish_step(where.layout, finish_of(interpolant, controller, y, ks, y1, out, out_stride, stage, w)));
}

void end_step(const OwnedLayout& where, const Table& table, const Interpolant& interpolant, Controller& controller,
              py::handle rtol, py::handle atol, py::handle y, const py::list& ks, py::handle y1, py::handle out,
              int64_t out_stride, py::handle stage, double w) {
  ErrorNorm norm;
  table.error.fill(norm, [&](int j) { return derivative(ks, j); });
  norm.y0 = address(y);
  norm.y1 = address(y1);
  norm.dt = controller.dt();
  read_tolerances(rtol, atol, norm);
  norm.means = controller.means();
  norm.parts = controller.op.parts;
  check_launch(pyode::cuda::end_step(where.layout, norm, controller.prepare(Phase::judge, 0),
                                     finish_of(interpolant, controller, y, ks, y1, out, out_stride, stage, w)));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "pyode's compiled ops; see csrc/ops.h";
  m.attr("MAX_STAGES") = kMaxStages;
  m.attr("MAX_DEGREE") = kMaxDegree;
  m.attr("STATE_WORDS") = kWords;
  m.attr("COMPILER") = PYODE_COMPILER;
#if defined(PYODE_CUDA)
  m.attr("CUDA") = PYODE_STRINGIFY(PYODE_CUDA);
#else
  m.attr("CUDA") = py::none();
#endif
  m.def("simd_level", &cpu::simd_level);
  m.def("join_team", [](uintptr_t team) { cpu::join_team(reinterpret_cast<cpu::Team>(team)); });
  m.def("prefer_large_pages", [](py::handle array, size_t bytes) { cpu::prefer_large_pages(address(array), bytes); });
  py::class_<OwnedLayout>(m, "Layout")
      .def(py::init<int, bool, int64_t, int64_t, const std::vector<int64_t>&, int, bool, uintptr_t, py::object,
                    py::object, py::object>())
      .def_property_readonly("error_parts", &OwnedLayout::error_parts);
  py::class_<Table>(m, "Table").def(py::init<const py::tuple&, const py::tuple&, const py::tuple&>());
  py::class_<Controller>(m, "Controller")
      .def(py::init([](const OwnedLayout& layout, int time_scalar, py::handle state, int64_t stride, py::handle flags,
                       const py::tuple& abscissae, py::object times, py::object trial_times, py::object make_times,
                       py::object make_trial_times, const py::object& storage_uses) {
             return new Controller(layout, static_cast<Scalar>(time_scalar), state, stride, flags, abscissae,
                                   std::move(times), std::move(trial_times), std::move(make_times),
                                   std::move(make_trial_times), storage_uses);
           }),
           py::keep_alive<1, 2>())
      .def("set_policy", &Controller::set_policy)
      .def("set_grid", &Controller::set_grid)
      .def("set_norm", &Controller::set_norm)
      .def("run", [](Controller& self, int phase,
                     double first_step) { return self.run(static_cast<Phase>(phase), first_step); })
      .def_property_readonly("stage_times", [](const Controller& self) { return self.planned().whole(); })
      .def_property_readonly("turn", [](const Controller& self) { return self.op.turn; })
      .def("stay_on_device", &Controller::stay_on_device);
  py::class_<Interpolant>(m, "Interpolant")
      .def(py::init<const py::tuple&, const py::tuple&>())
      .def("weights_at", &Interpolant::weights_at);
  py::class_<Steps>(m, "Steps")
      .def(py::init<OwnedLayout&, const Table&, const Interpolant&, Controller&, py::object, py::object, py::object,
                    py::object>(),
           py::keep_alive<1, 2>(), py::keep_alive<1, 3>(), py::keep_alive<1, 4>(), py::keep_alive<1, 5>())
      .def("take", &Steps::take);
  py::class_<GridTimes>(m, "GridTimes")
      .def(py::init<const OwnedLayout&, py::object, py::object, int64_t, py::object, py::object, py::object>(),
           py::keep_alive<1, 2>())
      .def_readonly("under_way", &GridTimes::under_way);
  py::class_<AdamsTable>(m, "AdamsTable").def(py::init<const py::tuple&, const py::tuple&, int64_t>());
  py::class_<Inspector>(m, "Inspector").def(py::init<py::object, const py::object&, py::object, py::handle>());
  py::class_<Calls>(m, "Calls")
      .def(py::init(
               [](const Inspector& inspector, bool direct, bool watch) { return new Calls{inspector, direct, watch}; }),
           py::keep_alive<1, 2>())
      .def("restart", &Calls::restart)
      .def("settle", &Calls::settle)
      .def_readwrite("n", &Calls::n)
      .def_readonly("settled", &Calls::settled)
      .def_readonly("copies", &Calls::copies);
  py::class_<SolveAgain>(m, "SolveAgain").def(py::init<py::object>());
  py::class_<Kind, std::shared_ptr<Kind>>(m, "Kind").def(
      "__eq__", [](const Kind& a, const Kind& b) { return a == b; }, py::is_operator());
  py::class_<Kinds>(m, "Kinds")
      .def(py::init([](const Inspector& inspector, py::object backend, py::object grad_enabled, py::object transform,
                       py::object threads, py::object forward_mode) {
             return new Kinds(inspector, {std::move(backend), std::move(grad_enabled), std::move(transform),
                                          std::move(threads), std::move(forward_mode)});
           }),
           py::keep_alive<1, 2>())
      .def("of", &Kinds::of);
  py::class_<IdleLoops>(m, "IdleLoops")
      .def(py::init<const Kinds&, py::tuple, py::object, size_t>(), py::keep_alive<1, 2>())
      .def("solve", &IdleLoops::solve)
      .def("put", &IdleLoops::put)
      .def("clear", &IdleLoops::clear)
      .def("__len__", &IdleLoops::size);
  py::class_<Guards>(m, "Guards").def(py::init<py::list, py::list, py::list, py::list>()).def("hold", &Guards::hold);
  py::class_<Forms>(m, "Forms")
      .def(py::init<const Inspector&, py::list>(), py::keep_alive<1, 2>())
      .def("hold", &Forms::hold);
  m.def("stage_combine", &stage_combine);
  m.def("stages", &stages);
  m.def("take_grid_steps", &take_grid_steps);
  m.def("take_adams_steps", &take_adams_steps);
  m.def("stage_vjp", &stage_vjp);
  m.def("opposites", &opposites);
  m.def("error_norm", &error_norm);
  m.def("interpolate", &interpolate);
  m.def("select_rows", &select_rows);
  m.def("call_compiled", &call_compiled);
#if defined(PYODE_CUDA)
  m.def("finish_step", &finish_step);
  m.def("end_step", &end_step);
  using pyode::cuda::GraphLoop;
  py::class_<GraphLoop>(m, "GraphLoop")
      .def(py::init([] {
        auto loop = std::make_unique<GraphLoop>();
        if (const char* error = loop->create()) throw std::runtime_error(error);
        return loop;
      }))
      .def_property_readonly("condition", &GraphLoop::condition)
      .def("assemble",
           [](GraphLoop& self, uintptr_t opening, uintptr_t body) {
             if (const char* error = self.assemble(reinterpret_cast<void*>(opening), reinterpret_cast<void*>(body)))
               throw std::runtime_error(error);
           })
      .def("launch", [](const GraphLoop& self, uintptr_t stream) {
        py::gil_scoped_release unlocked;
        check_launch(self.launch(reinterpret_cast<void*>(stream)));
      });
#endif
}
