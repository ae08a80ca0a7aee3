// Calls of solves that were compiled at run time.
#pragma once

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "../compiled/solve.h"
#include "../cpu/parallel.h"
#include "arrays.h"

namespace pyode {
namespace bindings {

// What a signal's handler has raised while a long call without the GIL was under way.
inline thread_local std::optional<py::error_already_set> interruption;

/// Runs the handlers of signals that have arrived; whether one of them raised.
inline int interrupted() {
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() == 0) return 0;
  interruption.emplace();
  return 1;
}

/// Memory of this thread for compiled solves, which work without initializing it; kept from one to the next if not big.
struct Workspace {
  static constexpr size_t kMost = 1 << 24;

  std::unique_ptr<char[]> memory;
  size_t size = 0;

  static Workspace& kept() {
    static thread_local Workspace workspace;
    return workspace;
  }
  explicit Workspace() = default;
  explicit Workspace(size_t wanted) {  // a signal's handler may solve too, meanwhile
    std::swap(memory, kept().memory);
    std::swap(size, kept().size);
    if (size >= wanted) return;
    memory.reset(new char[wanted]);
    size = wanted;
  }
  void give_back() {
    if (size > kMost) return;
    std::swap(memory, kept().memory);
    std::swap(size, kept().size);
  }
};

/// Calls a solve that was compiled at run time, without the GIL. Its CompiledSolve lies at `arguments`, complete but
/// for the workspace, of so many bytes, and the inputs. Raises what a signal's handler has raised meanwhile.
///
/// Returns whether it was done. If not, some inputs are not contiguous or of another dtype than the solve.
inline bool call_compiled(uintptr_t function, uintptr_t arguments, size_t workspace, int threads,
                          const py::list& inputs, py::handle dtype) {
  auto& solve = *reinterpret_cast<CompiledSolve*>(arguments);
  std::vector<const void*> addresses;
  addresses.reserve(inputs.size());
  for (py::handle x : inputs) {
    if (attribute(x, PYODE_NAME(dtype)).ptr() != dtype.ptr()) return false;
    if (call_method(x, PYODE_NAME(is_contiguous)).ptr() != Py_True) return false;
    addresses.push_back(address(x));
  }
  Workspace memory(workspace);
  solve.workspace = memory.memory.get();
  solve.threads = threads;
  solve.inputs = addresses.data();
  solve.run_parallel = &cpu::run_parallel;
  solve.interrupted = &interrupted;
  {
    py::gil_scoped_release unlocked;
    reinterpret_cast<void (*)(CompiledSolve*)>(function)(&solve);
  }
  memory.give_back();
  if (solve.sample.status == kInterrupted) {
    py::error_already_set error = *std::exchange(interruption, std::nullopt);
    throw error;
  }
  return true;
}

}  // namespace bindings
}  // namespace pyode
