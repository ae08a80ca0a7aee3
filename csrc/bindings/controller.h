// The step-size controller of a solve, and a tableau's dense output, as Python holds them.
#pragma once

#include <array>

#include "../core/step.h"
#include "layout.h"

namespace pyode {
namespace bindings {

/// A Control with all that stays the same through a solve, and the times of the stages planned last.
class Controller {
 public:
  const OwnedLayout& where;
  Control op = {};

  /// Args:
  ///   times, trial_times: what the times of a step's stages, and that of a first step's trial, are like.
  ///   make_times, make_trial_times, storage_uses: see Supply.
  Controller(const OwnedLayout& layout, Scalar time_scalar, py::handle state, int64_t stride, py::handle flags,
             const py::tuple& abscissae, py::object times, py::object trial_times, py::object make_times,
             py::object make_trial_times, const py::object& storage_uses)
      : where(layout),
        times_like_(std::move(times)),
        trial_times_like_(std::move(trial_times)),
        times_(std::move(make_times), storage_uses),
        trial_times_(std::move(make_trial_times), storage_uses) {
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
    op.means = means_ = address<double>(means);
    op.n_segments = n_segments;
    op.parts = parts;
  }

  /// From now on a loop on the device reads the flags, and goes on as they say: 0, or a graph's condition. The times of
  /// all steps have one memory.
  void stay_on_device(unsigned long long condition) {
    op.condition = condition;
    op.turn = 0;
    if (!on_device_) times_.take(times_like_);
    on_device_ = true;
  }

  /// The flags; on CUDA they are still on the device, and -1 is returned.
  int64_t run(Phase phase, double first_step) {
    prepare(phase, first_step);
    PYODE_DISPATCH(where, control, op);
    return where.cuda ? -1 : op.flags[op.turn];
  }

  /// What is to be carried out for a phase; a step's times are then those planned.
  const Control& prepare(Phase phase, double first_step) {
    op.phase = phase;
    if (phase == Phase::try_first) {
      planned_ = &trial_times_.take(trial_times_like_);
    } else {
      planned_ = on_device_ ? &times_.last() : &times_.take(times_like_);
    }
    op.stage_times = planned_->data;
    op.first_step = first_step;
    op.turn = on_device_ ? 0 : 1 - op.turn;
    return op;
  }

  /// The times planned last: all, and for each stage.
  const Supply::Item& planned() const {
    if (planned_ == nullptr) throw py::value_error("no step has been planned");
    return *planned_;
  }

  const double* dt() const { return op.state.words + op.state.stride; }
  double* means() const { return means_; }

 private:
  py::object times_like_, trial_times_like_;
  Supply times_, trial_times_;
  const Supply::Item* planned_ = nullptr;
  bool on_device_ = false;
  double* means_ = nullptr;
};

/// A tableau's interpolant: for each stage the coefficients of x, x^2, ... and the weight at x = 1.
struct Interpolant {
  size_t n_stages;
  std::vector<int> stages;
  Interpolate op = {};

  Interpolant(const py::tuple& coefficients, const py::tuple& end) : n_stages(coefficients.size()) {
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

  /// The weights of all stages at position x of a step, to the bit those of interpolate.
  py::tuple weights_at(double x) const {
    py::tuple weights(n_stages);
    for (size_t j = 0; j < n_stages; ++j) weights[j] = 0.0;
    for (int j = 0; j < op.terms; ++j)
      weights[static_cast<size_t>(stages[static_cast<size_t>(j)])] =
          x == 1 ? op.end[j] : interpolant_weight(op.c[j], op.degree, x);
    return weights;
  }
};

}  // namespace bindings
}  // namespace pyode
