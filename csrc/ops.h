// The ops: one plain struct each, and one function for each backend. Whoever calls owns all memory; nothing is
// allocated here and nothing waits. B: samples, D: real numbers a sample (a complex number is two), T: output times.
// State arrays are [B, D], contiguous. Times and step sizes are double. A pointer is to host memory for cpu:: and to
// device memory for cuda::, unless its comment says "host".
#pragma once

#include "core/controller.h"

namespace pyode {

/// How the states of one solve lie in memory, and where their ops run.
struct Layout {
  Scalar scalar;
  bool is_complex;          // numbers come in pairs; norms take the modulus
  int64_t samples;          // B
  int64_t size;             // D
  int threads;              // cpu: at most so many
  bool func_is_long;        // cpu: whether evaluations take long, mostly on the threads that ops are shared among
  void* stream;             // cuda: a cudaStream_t
  const int64_t* segments;  // [n_segments + 1] offsets into D, rising from 0 to D
  int64_t n_segments;
  int64_t longest_segment;
};

/// out[b, d] = y[b, d] + dt[b] sum_j w_j k_j[b, d]. A sample with dt = 0 stands still: out = y, whatever k holds.
struct StageCombine {
  const void* y;
  const void* k[kMaxStages];
  double w[kMaxStages];
  int terms;         // those with a weight other than zero; may be none
  const double* dt;  // [B]; not read if there are no terms
  void* out;
};

/// The transpose: out_j[b, d] = dt[b] w_j g[b, d], for every j.
struct StageVjp {
  const void* g;
  double w[kMaxStages];
  int terms;
  const double* dt;  // [B]
  void* out[kMaxStages];
};

/// means[s, p, b]: the p-th part of the mean, over segment s, of the squared scaled error
/// |dt[b] sum_j w_j k_j| / (atol + rtol max(|y0|, |y1|)); see core/step.h. An empty segment's mean is 0.
struct ErrorNorm {
  const void* y0;
  const void* y1;
  const void* k[kMaxStages];
  double w[kMaxStages];
  int terms;
  const double* dt;         // [B]
  double rtol, atol;        // used where the pointers are null
  const double* rtol_each;  // [D], for complex states a number for each pair's both members
  const double* atol_each;
  int64_t rtol_stride = 1, atol_stride = 1;  // cuda: 0 where there is one number, in device memory
  double* means;                             // [n_segments, parts, B]
  int64_t parts;                             // cpu: 1; cuda: error_parts() or more
};

/// For each sample and each output i which its last step passed, at the position x in the step:
/// out[i, b, :] = y[b, :] + dt_prev[b] sum_j w_j(x) k_j[b, :],  w_j(x) = sum_p c_j[p] x^(p + 1).
struct Interpolate {
  const void* y;
  const void* k[kMaxStages];
  double c[kMaxStages][kMaxDegree];
  double end[kMaxStages];  // the weights at x = 1, to the bit those of the step
  int terms, degree;
  StepState state;
  Grid grid;
  void* out;  // [T, B, D], row i begins at i * out_stride numbers
  int64_t out_stride;
};

/// The outputs which each sample's last step passed; then, of those that accepted it, y = y1 and k0 = k1, in place; and
/// the next step's first stage, y + dt w k0. Only cuda: what a loop on the device does in place of the host's exchange
/// of pointers.
struct FinishStep {
  Interpolate outputs;  // with y as its y, and k0 as its first k where that has a weight
  void* y;
  void* k0;
  const void* y1;
  const void* k1;
  void* stage;  // may be null
  double w;
};

/// The transpose of Interpolate: what gradients of the outputs that each sample's last step passed give to the step,
/// out_j = dt_prev sum_m w_j(x_m) g_m and start = sum_m g_m. Only cuda, as the host knows which outputs there are. The
/// order is the host's: of one sample sums of at most kMaxStages terms as stage_combine has them, without the outputs
/// at the step's end, of which end = sum_m g_m; of several one by one, and end = 0.
struct InterpolateVjp {
  Interpolate outputs;  // of which neither states nor derivatives are read; out_stride is that of g
  const void* g;        // [T, B, D]
  void* out[kMaxStages];
  void* start;  // with `end`: may be null
  void* end;
};

/// out[b, :] = accepted[b] ? moved[b, :] : stayed[b, :], after a step which only some samples accepted.
struct SelectRows {
  const void* moved;
  const void* stayed;
  const int64_t* accepted;  // [B]
  void* out;
};

/// What the controller is asked to do. Each of the last three leaves a planned step behind, or an ended solve.
enum class Phase : int32_t {
  try_first,     // from the norms of y0 (first half of means) and f0 (second half): a trial step for the slope's change
  choose_first,  // from the norm of that change times the trial step: the first step
  given_first,   // the first step is given; the norms of y0 and f0 only have to be finite
  judge,         // from the norm of the scaled error: accept or reject, and the next step
};

/// The controller for all samples. A norm is the largest root mean square of the segments.
struct Control {
  Phase phase;
  StepState state;
  Policy policy;
  Grid grid;
  const double* means;  // [n_segments, parts, B], as error_norm leaves them; for a first step two such arrays in a row
  int64_t n_segments, parts;
  double first_step;
  Scalar time_scalar;    // the type of the times that f sees: the state's, real
  double c[kMaxStages];  // abscissae of the stages whose times are wanted
  int n_times;
  void* stage_times;  // [n_times, B] of the step planned; try_first: [1, B], the trial's time
  int64_t* flags;     // [3]; flags[turn] is written, and flags[1 - turn] cleared for the next call
  int turn;
  // cuda: the cudaGraphConditionalHandle of a loop on the device, which goes on while a sample runs; 0: there is none.
  // Then turn is 0, all flags are left in flags[1], and flags[2] counts blocks.
  unsigned long long condition;
};

namespace cpu {
void stage_combine(const Layout&, const StageCombine&);
void stage_vjp(const Layout&, const StageVjp&);
void error_norm(const Layout&, const ErrorNorm&);
void interpolate(const Layout&, const Interpolate&);
void select_rows(const Layout&, const SelectRows&);
void control(const Layout&, const Control&);
const char* simd_level();  // which of the compiled variants this machine runs
}  // namespace cpu

#if defined(PYODE_CUDA)
namespace cuda {
// Each returns null, or the text of the launch's error.
const char* stage_combine(const Layout&, const StageCombine&);
const char* stage_vjp(const Layout&, const StageVjp&);
const char* error_norm(const Layout&, const ErrorNorm&);
const char* interpolate(const Layout&, const Interpolate&);
const char* finish_step(const Layout&, const FinishStep&);
// error_norm, control and finish_step, in as few launches as can be
const char* end_step(const Layout&, const ErrorNorm&, const Control&, const FinishStep&);
const char* interpolate_vjp(const Layout&, const InterpolateVjp&);
const char* select_rows(const Layout&, const SelectRows&);
const char* repeat_while(const Layout&, const int64_t* left, unsigned long long condition);  // it holds where left > 0
const char* control(const Layout&, const Control&);
int64_t error_parts(const Layout&);  // into how many parts error_norm should split a mean
}  // namespace cuda
#endif

}  // namespace pyode
