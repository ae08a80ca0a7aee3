// The threads of the CPU loops.
//
// Ops on large states run next to ops of torch, whose OpenMP threads go on spinning for some milliseconds: they serve
// us as well, if the caller says where they are. All else, and a forked child, which has none of these, has a small
// pool of our own, sized by the caller (torch.get_num_threads()).
#pragma once

#include <cstdint>

namespace pyode::cpu {

/// Calls body(i, context) for every i in [0, n), on the calling thread and up to threads - 1 others of the pool. Which
/// thread takes which i is not fixed, so a body may only write what belongs to its i. Where the pool is busy with
/// another caller's work, the calling thread does it all. While it waits for the others, it calls idle(context) some
/// twenty times a second, if there is one.
void run_parallel(int64_t n, int threads, void (*body)(int64_t i, void* context), void* context,
                  void (*idle)(void* context) = nullptr);

/// Calls body(context) on every thread of a team, of which the caller is one, and waits for them: GOMP_parallel of
/// GCC's OpenMP library.
using Team = void (*)(void (*body)(void* context), void* context, unsigned threads, unsigned flags);

/// Makes a team do what the pool would do for `parallel_for`; none: the pool.
void join_team(Team team);

/// Numbers of a state from which on its ops are shared: below, getting hold of another thread costs more than it saves,
/// and func finds part of its input in another processor's cache. Where it has all processors at work itself, that part
/// is where it belongs.
int64_t worth_sharing(bool func_is_long = false);

/// As run_parallel, by the team if there is one.
void share(int64_t n, int threads, void (*body)(int64_t i, void* context), void* context);

template <class Body>
void parallel_for(int64_t n, int threads, Body body) {
  if (n <= 1 || threads <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  share(n, threads, [](int64_t i, void* context) { (*static_cast<Body*>(context))(i); }, &body);
}

}  // namespace pyode::cpu
