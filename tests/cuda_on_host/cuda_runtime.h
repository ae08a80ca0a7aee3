// What csrc/cuda uses of CUDA, on the host: for the tests of its kernels where there is no GPU.
//
// Blocks run one after the other. A block's threads are fibers, which take turns where they wait for each other, at
// __syncthreads and in shuffles; those of a kernel that has no __syncthreads just run one after the other. translate.py
// writes launches as calls of `launch`.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other, and share nothing else

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned width = 1, unsigned height = 1, unsigned depth = 1) : x(width), y(height), z(depth) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

template <class T>
T atomicOr(T* at, T bits) {
  const T before = *at;
  *at |= bits;
  return before;
}

template <class T>
T atomicAdd(T* at, T more) {
  const T before = *at;
  *at += more;
  return before;
}
inline unsigned atomicInc(unsigned* at, unsigned most) {
  const unsigned before = *at;
  *at = before >= most ? 0 : before + 1;
  return before;
}
template <class T>
T atomicExch(T* at, T next) {
  const T before = *at;
  *at = next;
  return before;
}
inline void __threadfence() {}

#define CUDART_VERSION 12040
/// A graph's condition is the address of a number.
inline void cudaGraphSetConditional(unsigned long long condition, unsigned value) {
  *reinterpret_cast<unsigned*>(condition) = value;
}

/// How many there have been.
extern "C" {
__attribute__((visibility("default"))) inline int64_t cuda_on_host_launches = 0;
}

namespace cuda_on_host {

constexpr unsigned kWarp = 32;

/// The threads of a block that synchronise.
class Block {
 public:
  void run(unsigned threads, const std::function<void()>& body) {
    body_ = &body;
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = *fibers_[i];
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack;
      fiber.context.uc_stack.ss_size = sizeof fiber.stack;
      fiber.context.uc_link = &caller_;
      makecontext(&fiber.context, &Block::begin, 0);
      fiber.state = kRuns;
    }
    for (;;) {
      for (current_ = 0; current_ < threads; ++current_) {
        if (fibers_[current_]->state != kRuns) continue;
        threadIdx.x = current_;
        swapcontext(&caller_, &fibers_[current_]->context);
      }
      bool some = false;
      for (unsigned i = 0; i < threads; i += kWarp)
        some |= release(i, i + kWarp < threads ? i + kWarp : threads, kInWarp);
      if (some) continue;
      if (all_done(threads)) return;
      if (!release(0, threads, kInBlock)) std::abort();  // threads wait for others that are not coming
    }
  }

  void wait_for_block() { wait(kInBlock); }

  /// x of the thread `delta` lanes on; its own where the warp ends.
  double from_below(double x, unsigned delta) {
    const unsigned from = current_ % kWarp + delta < kWarp ? current_ + delta : current_;
    fibers_[current_]->shown = x;
    wait(kInWarp);
    const double found = fibers_[from]->shown;
    wait(kInWarp);
    return found;
  }

  static Block& the_one() {
    static Block block;
    return block;
  }

 private:
  enum State { kRuns, kInWarp, kInBlock, kDone };
  struct Fiber {
    ucontext_t context;
    State state;
    double shown;
    alignas(64) char stack[1 << 16];
  };
  static void begin() {
    Block& block = the_one();
    (*block.body_)();
    block.fibers_[block.current_]->state = kDone;
  }
  void wait(State where) {
    const unsigned self = current_;
    fibers_[self]->state = where;
    swapcontext(&fibers_[self]->context, &caller_);
  }
  /// Lets those go on that wait there, if all do that are not done; whether there are any.
  bool release(unsigned first, unsigned end, State where) {
    bool some = false;
    for (unsigned i = first; i < end; ++i) {
      if (fibers_[i]->state != where && fibers_[i]->state != kDone) return false;
      some |= fibers_[i]->state == where;
    }
    for (unsigned i = first; i < end; ++i)
      if (fibers_[i]->state == where) fibers_[i]->state = kRuns;
    return some;
  }
  bool all_done(unsigned threads) const {
    for (unsigned i = 0; i < threads; ++i)
      if (fibers_[i]->state != kDone) return false;
    return true;
  }
  std::vector<std::unique_ptr<Fiber>> fibers_;
  ucontext_t caller_;
  const std::function<void()>* body_ = nullptr;
  unsigned current_ = 0;
};

inline void launch(bool synchronises, dim3 grid, unsigned threads, cudaStream_t, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  ++cuda_on_host_launches;
  gridDim = grid;
  blockDim = dim3(threads);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      if (synchronises) {
        Block::the_one().run(threads, body);
        continue;
      }
      for (unsigned i = 0; i < threads; ++i) {
        threadIdx.x = i;
        body();
      }
    }
  }
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::Block::the_one().wait_for_block(); }
inline double __shfl_down_sync(unsigned, double x, unsigned delta) {
  return cuda_on_host::Block::the_one().from_below(x, delta);
}
