// What a solve by code that is compiled at run time is given, and gives.
#pragma once

#include "../core/controller.h"

namespace pyode {

/// An accepted step, as its undoing needs it.
struct TapeStep {
  double t0, dt, t1;
  double first_time;  // that f saw in the step's first evaluation
  int64_t output_begin, output_end;
  int64_t chained;   // whether that evaluation was the last of the step before
  int64_t on_jump;   // whether a discontinuity has it end
  int64_t previous;  // of a row with steps of its own: the index of the step before; -1 for the first
};

/// A solve, as Python hands it over; pyode/compiled/native.py has the same struct.
struct CompiledSolve {
  const void* y0;   // packed as pyode/state.py does: the parts of a tuple one behind the other, each [rows, ...]
  void* out;        // [T] such states
  void* workspace;  // for `workspace` bytes
  const void* const* inputs;  // the tensors that f has closed over, contiguous
  int64_t rows;
  Grid grid;
  Policy policy;
  double rtol, atol;                    // used where the pointers are null
  const double *rtol_each, *atol_each;  // for every number of a state
  double first_step;                    // nan: to be found
  const double* first_steps;            // for each row, instead
  const double* ends;                   // fixed grid: the n_ends times of the steps' ends
  int64_t n_ends;
  const void* stage_times;  // fixed grid: [n_ends - 1, evaluations], as f sees them
  int64_t cubic;            // fixed grid: whether outputs lie on cubics instead of lines
  int64_t threads;
  // idle(context) is called now and then by a calling thread that waits for the others.
  void (*run_parallel)(int64_t n, int threads, void (*body)(int64_t, void*), void* context, void (*idle)(void*));
  int (*interrupted)();  // asked now and then, by the calling thread; not 0: stop
  // A solve whose gradient is wanted notes its steps; then it is undone.
  void* tape;        // [capacity, blocks] records, or [capacity, D] numbers of rows with steps of their own
  int64_t record;    // bytes: of Evaluations, or of the state at the step's start alone, [D] vectors
  TapeStep* steps;   // [capacity]
  int64_t capacity;  // a solve of more steps goes on without noting them
  int64_t n_steps;
  const void* gradient;          // [T] states: what arrives at the outputs
  void* y0_gradient;             // a state
  void* const* gradients;        // of the inputs for which they are wanted; behind them is a place for that of time
  double* output_time_gradient;  // [T], or of rows with steps of their own [T, rows]: of the outputs, as they move
  double* end_gradient;          // [n_steps + 1]: of the ends of a state's steps
  // The backward solve of the continuous adjoint, whose state is (y, a).
  const void* arriving_states;  // [T] states of the forward solve, at whose times `gradient` arrives
  const double* arrival_times;  // [n_arrivals], or of rows with steps of their own [n_arrivals, rows], in its order
  int64_t n_arrivals;
  double integral_rtol, integral_atol;
  int64_t first_measured;  // the first of the integrals, of which time's is the last, with a share in the norm
  // What comes back.
  double* states;    // of rows with steps of their own, [kRowWords, rows]
  int64_t n_failed;  // of these rows
  Sample sample;
  int64_t evaluations;
  int64_t finite_start;  // after a failure before the first step: whether y0 and f(t0, y0) are finite
};

constexpr int64_t kInterrupted = -1;  // a status beside those of the controller

/// What is told of a row with steps of its own: the words of its Sample, then, as integers, how often f was evaluated,
/// its last step's index on the tape, and finite_start.
constexpr int kRowWords = kWords + 3;

}  // namespace pyode
