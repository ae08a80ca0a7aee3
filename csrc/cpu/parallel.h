// A small pool of threads for the CPU loops.
//
// Not OpenMP: its pool does not survive a fork. Ours is sized by the caller (torch.get_num_threads()) and made
// anew in a forked child.
#pragma once

#include <cstdint>

namespace pyode::cpu {

/// Calls body(i, context) for every i in [0, n), on the calling thread and up to threads - 1 others. Which thread
/// takes which i is not fixed, so a body may only write what belongs to its i. Where the pool is busy with
/// another caller's work, the calling thread does it all. While it waits for the others, it calls idle(context) some
/// twenty times a second, if there is one.
void run_parallel(int64_t n, int threads, void (*body)(int64_t i, void* context), void* context,
                  void (*idle)(void* context) = nullptr);

template <class Body>
void parallel_for(int64_t n, int threads, Body body) {
  if (n <= 1 || threads <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  run_parallel(n, threads, [](int64_t i, void* context) { (*static_cast<Body*>(context))(i); }, &body);
}

}  // namespace pyode::cpu
