// Threads that share a compiled solve, of which one finds out that Ctrl-C has been pressed: for ThreadSanitizer.
#include <thread>

#include "../../csrc/compiled/blocks.h"

using namespace pyode;

int main() {
  CompiledSolve solve = {};
  solve.rows = solve.threads = 2;
  solve.interrupted = [] { return 1; };
  solve.run_parallel = [](int64_t, int, void (*body)(int64_t, void*), void* context, void (*)(void*)) {
    std::thread other([=] { body(1, context); });
    body(0, context);
    other.join();
  };
  compiled::Interruption interruption{solve};
  constexpr int64_t step = 1 << 23;
  auto until_stopped = [&](int64_t) {
    int64_t spent = 0;
    while (!interruption.after(step, spent)) std::this_thread::yield();
  };
  compiled::share(interruption, 2, step, until_stopped);
  return interruption.stopped() ? 0 : 1;
}
