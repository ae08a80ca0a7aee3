#include "parallel.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace pyode::cpu {
namespace {

#if defined(__linux__)
/// Keeps threads off the processor of the one that waits for them.
///
/// A thread is often woken on the processor of whoever wakes it, if all are busy: and they are, for a while after an op
/// of torch, whose OpenMP threads go on spinning. Where both then take turns on one, the other's spinning wins nothing.
class KeepOff {
 public:
  void keep_off_mine(std::vector<std::thread>& threads) {
    const int mine = sched_getcpu();
    if (mine < 0 || mine == last_ || sched_getaffinity(0, sizeof allowed_, &allowed_) != 0) return;
    last_ = mine;
    if (CPU_COUNT(&allowed_) < 2 || mine >= CPU_SETSIZE) return;
    CPU_CLR(mine, &allowed_);
    for (std::thread& thread : threads) pthread_setaffinity_np(thread.native_handle(), sizeof allowed_, &allowed_);
  }

 private:
  int last_ = -1;
  cpu_set_t allowed_;
};
#else
struct KeepOff {
  void keep_off_mine(std::vector<std::thread>&) {}
};
#endif

class Pool {
 public:
  explicit Pool(int helpers) : wanted_(helpers) {
    threads_.reserve(static_cast<size_t>(helpers));
    try {
      for (int i = 0; i < helpers; ++i) threads_.emplace_back([this] { serve(); });
    } catch (const std::system_error&) {  // there may be no more threads: those that there are do the work
    }
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  /// How many helpers were asked for.
  int wanted() const { return wanted_; }

  // The caller never waits for a helper that has not begun: on a busy machine one may wake late, and finds the job
  // closed.
  void run(int64_t n, void (*body)(int64_t, void*), void* context, void (*idle)(void*)) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = body;
      context_ = context;
      n_ = n;
      next_.store(0, std::memory_order_relaxed);
      open_ = true;
    }
    place_.keep_off_mine(threads_);
    wake_.notify_all();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    open_ = false;
    while (!done_.wait_for(lock, std::chrono::milliseconds(50), [this] { return at_work_ == 0; })) {
      if (idle == nullptr) continue;
      lock.unlock();
      idle(context);
      lock.lock();
    }
  }

 private:
  void work() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n_;) body_(i, context_);
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return stop_ || (open_ && next_.load(std::memory_order_relaxed) < n_); });
      if (stop_) return;
      ++at_work_;
      lock.unlock();
      work();
      lock.lock();
      if (--at_work_ == 0) done_.notify_one();
    }
  }

  const int wanted_;
  std::vector<std::thread> threads_;
  KeepOff place_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  void (*body_)(int64_t, void*) = nullptr;
  void* context_ = nullptr;
  int64_t n_ = 0;
  std::atomic<int64_t> next_{0};
  int at_work_ = 0;
  bool open_ = false;
  bool stop_ = false;
};

// Never destroyed: at exit other threads may still be solving.
struct Shared {
  std::mutex busy;
  Pool* pool = nullptr;
  Team team = nullptr;
};
Shared* shared = new Shared;

#if !defined(_WIN32)
// The child of a fork has none of the threads, and its copy of the lock may be held by one of them.
const int at_fork = pthread_atfork(nullptr, nullptr, [] { shared = new Shared; });
#endif

/// What a team shares: each takes the next i until none is left.
struct Job {
  int64_t n;
  void (*body)(int64_t, void*);
  void* context;
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(i, context);
  }
};

/// Whether the system gives so many threads more. A team that can't start ends the process.
bool may_start(int threads) {
  std::vector<std::thread> started;
  std::atomic<bool> done{false};
  bool all = true;
  try {
    for (int i = 0; i < threads; ++i)
      started.emplace_back([&done] {
        while (!done) std::this_thread::yield();
      });
  } catch (const std::system_error&) {
    all = false;
  }
  done = true;
  for (std::thread& thread : started) thread.join();
  return all;
}

/// Calls work() with all threads, or alone where another caller has them.
template <class Work>
void with_threads(int64_t n, void (*body)(int64_t, void*), void* context, Work work) {
  std::unique_lock<std::mutex> mine(shared->busy, std::try_to_lock);
  if (mine.owns_lock()) return work();
  for (int64_t i = 0; i < n; ++i) body(i, context);
}

}  // namespace

void run_parallel(int64_t n, int threads, void (*body)(int64_t, void*), void* context, void (*idle)(void*)) {
  with_threads(n, body, context, [&] {
    if (shared->pool == nullptr || shared->pool->wanted() != threads - 1) {
      delete shared->pool;
      shared->pool = nullptr;
      shared->pool = new Pool(threads - 1);
    }
    shared->pool->run(n, body, context, idle);
  });
}

void join_team(Team team) { shared->team = team; }

int64_t worth_sharing(bool func_is_long) {
  if (shared->team == nullptr) return 1 << 16;
  return func_is_long ? 1 << 14 : 1 << 15;
}

void share(int64_t n, int threads, void (*body)(int64_t, void*), void* context) {
  static thread_local int largest = 1;  // team of this thread's that there has been
  if (shared->team == nullptr || (threads > largest && !may_start(threads - 1)))
    return run_parallel(n, threads, body, context);
  largest = threads > largest ? threads : largest;
  with_threads(n, body, context, [&] {
    Job job{n, body, context};
    shared->team([](void* theirs) { static_cast<Job*>(theirs)->work(); }, &job, static_cast<unsigned>(threads), 0);
  });
}

}  // namespace pyode::cpu
