// Threads that run one function together and wait for each other within it.

#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include <sched.h>

// Functions of the OpenMP library that torch has loaded, by libgomp's names, which LLVM's and Intel's libraries have too. Clang compiles `#pragma omp parallel`
// to other names, which libgomp does not have; Apple's clang, and a clang without libomp, make nothing of it.
extern "C" {
void GOMP_parallel(void (*)(void*), void*, unsigned threads, unsigned flags);
int omp_get_thread_num();
int omp_get_num_threads();
}

// All threads of a region wait here for the last one. They spin, as a node takes microseconds, but let others run where there are more threads than cores.
class Meeting {
  const int64_t threads;
  alignas(64) std::atomic<int64_t> arrived{0};
  alignas(64) std::atomic<int64_t> round{0};

 public:
  explicit Meeting(int64_t n) : threads(n) {}
  void wait() {
    if (threads == 1) return;
    const int64_t now = round.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived.store(0, std::memory_order_relaxed);
      round.store(now + 1, std::memory_order_release);
      return;
    }
    for (int64_t spins = 0; round.load(std::memory_order_acquire) == now; spins++) {
      if (spins > 2000) sched_yield();
#if defined(__x86_64__)
      else __builtin_ia32_pause();
#endif
    }
  }
};

// Runs f(k) on every thread k of a team, all of them at the same time
template <class F> void together(int64_t threads, const F& f) {
  if (threads == 1) return f(0);
  struct Region {
    const F& f;
    const int64_t threads;
    bool complete;
    static void run(void* region) {
      Region& all = *static_cast<Region*>(region);
      if (omp_get_num_threads() == all.threads) all.f(omp_get_thread_num());
      else if (omp_get_thread_num() == 0) all.complete = false;  // OpenMP may give fewer than asked for
    }
  } region{f, threads, true};
  GOMP_parallel(Region::run, &region, unsigned(threads), 0);
  if (region.complete) return;
  std::vector<std::thread> team;
  for (int64_t k = 0; k < threads; k++) team.emplace_back(f, k);
  for (std::thread& thread : team) thread.join();
}
